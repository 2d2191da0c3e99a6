"""Losses between a student's logits and what a store keeps of the teacher's distribution.

N rows, V the student's vocabulary, K kept ids, n temperatures, H hidden size. docs/training.md has the formulas.

A store of method topk has the teacher's probability p of each of the K kept ids, and one number for all other ids
together: the mass of the tail. `tail` says what a loss does with it:

bucket        it is one more event. Both distributions are over K + 1 events; the last is "any other id". The divergence
              is a lower bound of the full one, and zero only where both agree on all K + 1 events
renormalize   it is left out, and p is scaled up to a sum of 1. This is biased: it teaches overconfidence
ground_truth  it is given to the token that really follows (Anshumann et al., Sparse Logit Sampling, ACL 2025)

In a row of method sample some ids of the tail were drawn, and stand for all of it: each weighs an equal part of its
mass. The expected weight of every id is its p. So the gradient of forward KL with these weights is, in the mean, that
with the whole p (its value is higher, whatever the student says), and `tail` has nothing to do. A divergence that is
not linear in p has no such estimate.

on_policy asks of the teacher one number only: how likely it finds the token that the student wrote (next_logprob). So
it has no tail, and any store will do that was made from the student's own samples.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.errors import ConfigError
from distill.student.divergence import Target, forward_kl, jensen_shannon, log_softmax_at, on_policy, reverse_kl

_TARGETS = ("target_ids", "target_logprobs", "logsumexp", "tail_logprob", "next_tokens")


@dataclass(frozen=True)
class DistillationLoss:
    """alpha * temperature**2 * divergence(p_T, q_T) + (1 - alpha) * cross-entropy with the next token, per row.

    The factor temperature**2 gives gradients of about the same size at all temperatures (Hinton et al.).
    max_advantage, max_ratio: of on_policy, as `divergence.on_policy` says.
    """

    divergence: str = "forward_kl"
    tail: str = "bucket"
    temperature: float = 1.0
    alpha: float = 1.0
    max_advantage: float | None = None
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, found, choices in (
            ("divergence", self.divergence, ("forward_kl", "reverse_kl", "jensen_shannon", "on_policy")),
            ("tail", self.tail, ("bucket", "renormalize", "ground_truth")),
        ):
            if found not in choices:
                raise ConfigError(f"loss.{name}: expected {', '.join(choices)}, found {found!r}")
        if self.divergence != "forward_kl" and self.tail != "bucket":
            why = "needs the teacher's probability of everything that the student says"
            why = "looks at no tail" if self.divergence == "on_policy" else why
            raise ConfigError(f"loss.tail: expected bucket with {self.divergence}, which {why}, found {self.tail}")
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"loss: expected temperature > 0 and alpha in [0, 1], found {self.temperature} and {self.alpha}"
            )
        if self.divergence == "on_policy" and self.temperature != 1:
            raise ConfigError(
                "loss.temperature: expected 1 with on_policy, since the store says at temperature 1 how likely a token "
                f"is, found {self.temperature:g}"
            )
        for name, bound in (("max_advantage", self.max_advantage), ("max_ratio", self.max_ratio)):
            if bound is not None and (self.divergence != "on_policy" or not bound > 0):
                wanted = "a number > 0" if self.divergence == "on_policy" else f"null with {self.divergence}"
                raise ConfigError(f"loss.{name}: expected {wanted}, found {bound:g}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of what it reads of a batch."""
        if self.alpha == 0:
            return ("next_tokens",)
        if self.divergence == "on_policy":
            return ("next_tokens", "next_logprob", *(() if self.max_ratio is None else ("sampled_logprob",)))
        return _TARGETS

    @property
    def _rescales(self) -> bool:
        """Whether it wants the kept ids' probabilities at another temperature, over the whole vocabulary."""
        return self.temperature != 1 and self.tail != "renormalize"

    @property
    def linear(self) -> bool:
        """Whether the gradient is linear in the teacher's probabilities: then a sample gives it in the mean."""
        return self.alpha == 0 or (self.divergence == "forward_kl" and self.temperature == 1)

    def check_method(self, method: str) -> None:
        """Raise ConfigError where rows of a store of this capture.method do not hold what this loss needs."""
        if method == "sample" and not self.linear and self.divergence != "on_policy":
            more = "" if self.temperature == 1 else f" capture.temperatures=[1.0,{self.temperature:g}]"
            raise ConfigError(
                "loss: expected divergence forward_kl and temperature 1 with a store of capture.method=sample, whose "
                f"rows are right in the mean for nothing else, found {self.divergence} and {self.temperature:g} "
                f"(generate with capture.method=topk capture.k=64{more} for that)"
            )

    def check_weights(self, sampled: str, without: str) -> None:
        """Raise ConfigError, if this loss reads targets, for `sampled` rows together with what has no tail_logprob."""
        if "tail_logprob" in self.reads:
            raise ConfigError(
                f"loss: expected tail_logprob beside {sampled}, whose drawn ids it weighs, found none in {without} "
                "(train on stores of capture.method=sample apart from stores without a tail)"
            )

    def check(self, temperatures: Sequence[float]) -> None:
        """Raise ConfigError where a store with these `temperatures` does not hold what this loss needs."""
        if self.temperature not in temperatures and self.tail != "renormalize":
            raise ConfigError(
                f"loss.temperature: expected one of {list(temperatures)}, which the store holds, found "
                f"{self.temperature}: the mass outside the kept ids at another temperature cannot be known (generate "
                f"with capture.method=topk capture.temperatures=[1.0,{self.temperature}], or use loss.tail=renormalize)"
            )

    def check_arrays(self, there: Collection[str], where: str) -> None:
        """Raise ConfigError where a store, or a batch, lacks what not every one has. there: names of its arrays."""
        if "next_logprob" in self.reads and "next_logprob" not in there:
            raise ConfigError(
                f"loss.divergence: expected next_logprob in {where} with on_policy, found none: it is of an older "
                "version of distill (generate it again), or was captured by others without it"
            )
        if "tail_logprob" in self.reads and self.tail != "renormalize" and "tail_logprob" not in there:
            raise ConfigError(
                f"loss: expected divergence forward_kl and tail renormalize with {where}, which does not say how "
                f"likely the ids are that a row does not name, found {self.divergence} and {self.tail}"
            )
        if "logsumexp" in self.reads and self._rescales and "logsumexp" not in there:
            raise ConfigError(
                f"loss.temperature: expected 1 with {where}, which has no logsumexp, found {self.temperature:g} (or "
                "use loss.tail=renormalize)"
            )
        if "sampled_logprob" in self.reads and "sampled_logprob" not in there:
            raise ConfigError(
                f"loss.max_ratio: expected sampled_logprob in {where}, found none: its data had no column logprobs "
                "(generate from rollouts that have one, or leave max_ratio out)"
            )

    def target(self, rows: Mapping[str, Tensor], temperatures: Sequence[float], vocab_size: int) -> Target:
        """The teacher's distribution at this temperature, for a student with `vocab_size` ids.

        rows: of a batch, [N, ...]. The mass of kept ids that the student lacks (padding of the teacher's softmax) is
        added to the tail. A row of which the student knows no kept id has an event without mass, and all in the tail;
        where there is no tail, its target means nothing, and `per_row` leaves it out.
        Raises ConfigError for a row of method sample where this loss cannot be had from one, or without tails.
        """
        at_one, t = list(temperatures).index(1.0), self.temperature
        column = at_one if self.tail == "renormalize" else list(temperatures).index(t)
        ids, logprobs = rows["target_ids"], rows["target_logprobs"]
        none = logprobs.new_full((len(logprobs), column + 1), torch.nan)  # nothing is drawn of what is unknown
        mass, tail = rows.get("tail_logprob", none)[:, column], None
        drawn = are_drawn(ids, logprobs)
        if not self.linear and drawn.any():
            self.check_method("sample")
        if "tail_logprob" not in rows and drawn.any():
            self.check_weights("rows of capture.method=sample", "the batch")
        weight = mass - drawn.sum(dim=1).clamp(min=1).log()  # of each id that was drawn
        if self._rescales:
            logprobs = (logprobs + rows["logsumexp"][:, [at_one]]) / t - rows["logsumexp"][:, [column]]
        else:
            logprobs = logprobs / t
        if self.tail != "renormalize":
            tail = mass.masked_fill(drawn.any(dim=1), -torch.inf)
        logprobs = torch.where(drawn, weight[:, None], logprobs).masked_fill(ids < 0, -torch.inf)
        none = ids < 0
        ids = torch.where(none, ids[:, :1], ids)
        if vocab_size <= int(ids.max()):
            unknown = ids >= vocab_size
            none = none | unknown
            if tail is not None:
                tail = torch.logaddexp(tail, logprobs.masked_fill(~unknown, -torch.inf).logsumexp(dim=1))
            logprobs = logprobs.masked_fill(unknown, -torch.inf)
            spare = ids.masked_fill(unknown, vocab_size).min(dim=1, keepdim=True).values
            ids = torch.where(unknown, torch.where(spare < vocab_size, spare, 0), ids)
        if tail is None:
            nothing = (logprobs == -torch.inf).all(dim=1, keepdim=True)
            return Target(ids, logprobs.masked_fill(nothing, 0.0).log_softmax(dim=1))
        # Stored values are rounded. Scale them to a sum of exactly 1: then the divergence is least where q is p.
        events = torch.cat([logprobs, tail[:, None]], dim=1).log_softmax(dim=1)
        logprobs, tail = events[:, :-1], events[:, -1:]
        if self.tail == "bucket":
            return Target(ids, logprobs, tail[:, 0], none)
        following = rows["next_tokens"][:, None]
        kept = (ids == following) & logprobs.isfinite()
        return Target(
            torch.cat([ids, following.clamp(min=0)], dim=1),
            torch.cat(
                [
                    torch.where(kept, torch.logaddexp(logprobs, tail), logprobs),
                    tail.masked_fill(kept.any(dim=1, keepdim=True), -torch.inf),
                ],
                dim=1,
            ),
        )

    def per_row(self, logits: Tensor, rows: Mapping[str, Tensor], temperatures: Sequence[float]) -> Tensor:
        """The loss of each row, [N]: logits [N, V] of any float dtype, rows of a batch [N, ...].

        It is in float32, or in float64 where the logits are. The divergence of a row of which the student knows no kept
        id is 0 with bucket, where both say "any other id", and with renormalize, which leaves nothing to learn from it;
        with ground_truth the next token has all mass. on_policy looks at no kept ids.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = own = logits.new_zeros(len(logits))
        if self.alpha < 1 or self.divergence == "on_policy":
            own = log_softmax_at(logits, rows["next_tokens"][:, None])[:, 0]
        if self.alpha > 0 and self.divergence == "on_policy":
            sampled = None if self.max_ratio is None else rows["sampled_logprob"]
            loss = self.alpha * on_policy(own, rows["next_logprob"], sampled, self.max_advantage, self.max_ratio)
        elif self.alpha > 0:
            target = self.target(rows, temperatures, logits.shape[1])
            divergence = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}
            scaled = logits if self.temperature == 1 else logits / self.temperature
            found = divergence[self.divergence](scaled, target)
            if self.tail != "ground_truth":
                ids = rows["target_ids"]
                found = torch.where(((ids >= 0) & (ids < logits.shape[1])).any(dim=1), found, 0.0)
            loss = self.alpha * self.temperature**2 * found
        return loss if self.alpha == 1 else loss - (1 - self.alpha) * own

    def from_hidden(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        batch: Mapping[str, Tensor],
        temperatures: Sequence[float],
        chunk_tokens: int = 1024,
    ) -> Tensor:
        """The sum of the loss over the positions in the batch's loss_mask, from hidden states [B, L, H].

        head: from [N, H] to logits [N, V]. It runs on `chunk_tokens` positions at a time, and again in the backward
        pass: only one chunk of the logits [B, L, V] is in memory. An empty batch gives 0, and gradients of 0 to every
        parameter. Raises ConfigError for a batch that lacks what the loss reads.
        """
        self.check_arrays(batch, "the batch")
        mask = batch["loss_mask"]
        if not mask.any():  # a row with weight 0: DistributedDataParallel waits for every gradient
            return (head(hidden[:1, 0]).float() * 0).sum() + (hidden * 0).sum()
        rows = {name: batch[name][mask] for name in self.reads if name in batch}
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        starts = range(0, len(rows["next_tokens"]), chunk_tokens)
        for start, part in zip(starts, torch.split(hidden[mask], chunk_tokens), strict=True):
            chosen = {name: values[start : start + chunk_tokens] for name, values in rows.items()}

            def chunk(part: Tensor, chosen: dict[str, Tensor] = chosen) -> Tensor:
                return self.per_row(head(part), chosen, temperatures).sum()

            total = total + checkpoint(chunk, part, use_reentrant=False)
        return total

    def from_logits(self, logits: Tensor, batch: Mapping[str, Tensor], temperatures: Sequence[float]) -> Tensor:
        """The same from logits [B, L, V], for models that change their logits after the output head."""
        return self.from_hidden(logits, lambda part: part, batch, temperatures)


def are_drawn(ids: Tensor, logprobs: Tensor) -> Tensor:
    """[N, K]: whether an id was drawn. A sample's last place never has a log-probability; a NaN elsewhere is none."""
    return (ids >= 0) & logprobs.isnan() & logprobs[:, -1:].isnan()
