"""A student's forward pass over a batch, with the loss in the place of its output head.

V the student's vocabulary, H its hidden size, n positions.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.student.loss import DistillationLoss
from distill.student.packing import evaluating, pack, sees_neighbours, wants_one_row

logger = logging.getLogger(__name__)

Measure = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
_CHUNK_TOKENS = 1024


class Learner(nn.Module):
    """A student and its loss as one module: from a batch to the sum of its losses.

    Call it in place of the student. It may be wrapped in DistributedDataParallel or fully_shard, and the student may
    have adapters (peft).
    """

    def __init__(self, model: Any, loss: DistillationLoss, temperatures: Sequence[float], packed: bool = False) -> None:
        """model: a transformers causal LM. temperatures: the store's. packed: as for `BatchLoss`.

        Raises ConfigError where the store does not hold what the loss needs.
        """
        super().__init__()
        self.model, self._losses = model, BatchLoss(loss, temperatures, packed)

    def forward(self, batch: Mapping[str, Tensor], measure: Measure | None = None) -> Tensor:
        """The sum of the loss over the positions in the batch's loss_mask, a float32 scalar; or the sum of `measure`.

        measure: from logits [n, V] and the same positions of the batch [n, ...] to a tensor of sums
        """
        if measure is None:
            return self._losses.sum(self.model, self.model, batch)
        return self._losses.measure(self.model, self.model, batch, measure)


class BatchLoss:
    """The sum of a DistillationLoss over a batch, out of a model's own forward pass.

    The first batch shows two things about a model, on its device, in its dtype, as it is wrapped, at the shape of that
    batch: whether its logits are what its output head returns, without soft-capping or scale, so that the head can run
    in chunks; and, with packing, whether samples of one row see each other.
    """

    def __init__(self, loss: DistillationLoss, temperatures: Sequence[float], packed: bool) -> None:
        """packed: put samples end to end into as few rows as possible, for the length of the call."""
        loss.check(temperatures)
        self._loss, self._temperatures, self._packed = loss, list(temperatures), packed
        self._sliced: bool | None = None

    def sum(self, model: Any, inner: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of the loss over the positions in the batch's loss_mask, a float32 scalar.

        model: what is called. inner: the same without what it was wrapped in. Raises ConfigError where samples of one
        row see each other, and for a batch that lacks what the loss reads.
        """
        self._loss.check_arrays(batch, "the batch")
        batch = self._prepared(model, inner, batch)

        def loss(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
            return self._loss.from_hidden(hidden, head, batch, self._temperatures)

        return self._at_head(model, inner, batch, loss)

    def measure(self, model: Any, inner: Any, batch: Mapping[str, Tensor], measure: Measure) -> Tensor:
        """The sum of `measure` over the same positions."""
        batch = self._prepared(model, inner, batch)
        mask = batch["loss_mask"] if batch["loss_mask"].any() else torch.ones_like(batch["loss_mask"])
        rows = {name: values[mask] for name, values in batch.items() if values.shape[:2] == mask.shape}
        sums: list[Tensor] = []

        def measured(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
            for i, part in enumerate(torch.split(hidden[mask], _CHUNK_TOKENS)):
                chosen = {k: v[i * _CHUNK_TOKENS : (i + 1) * _CHUNK_TOKENS] for k, v in rows.items()}
                sums.append(measure(head(part).float(), chosen))
            return hidden.new_zeros(())

        self._at_head(model, inner, batch, measured)
        return torch.stack(sums).sum(dim=0) * batch["loss_mask"].any()

    def _prepared(self, model: Any, inner: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch as the model gets it. The first one is used to look at the model."""
        one_row = wants_one_row(inner)
        if self._packed:
            batch = pack(batch, one_row)
        if self._sliced is not None:
            return batch
        ids = batch["input_ids"]
        with evaluating(model):
            self._sliced = head_is_last(model, inner, ids[:1, :8])
            if not self._sliced:
                logger.info("student: its logits are more than its output head's; those of a whole batch are in memory")

            def states(ids: Tensor, positions: Tensor) -> Tensor:
                found: list[Tensor] = []

                def keep(hidden: Tensor, _: Any) -> Tensor:
                    found.append(hidden)
                    return hidden.new_zeros(())

                self._at_head(model, inner, {"input_ids": ids.to(device), "position_ids": positions.to(device)}, keep)
                return found[0]

            device, vocab = ids.device, int(inner.config.get_text_config().vocab_size)
            if self._packed and sees_neighbours(states, ids.shape, one_row, vocab):
                self._sliced = None
                kernel = getattr(inner.config.get_text_config(), "_attn_implementation", None)
                raise ConfigError(
                    f"packed: expected false for this student ({type(inner).__name__}, {kernel} attention): samples in "
                    "one row would see each other"
                )
        return batch

    def _at_head(
        self,
        model: Any,
        inner: Any,
        batch: Mapping[str, Tensor],
        what: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    ) -> Tensor:
        """A scalar: `what` of the hidden states and the head; or of all logits, and a head that returns them."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}

        def of_each_token(states: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
            if states.shape[:2] != inputs["input_ids"].shape:
                raise ConfigError(
                    f"model: expected {inputs['input_ids'].shape[1]} positions for as many tokens, found "
                    f"{states.shape[1]}: an adapter that adds tokens of its own (prompt tuning) is not meant"
                )
            return what(states, head)

        if not self._sliced:
            return of_each_token(model(**inputs, use_cache=False).logits, lambda logits: logits)
        head = inner.get_output_embeddings()
        logits_of = head.forward
        # inside of what DDP, FSDP and autocast wrap: what they do to a forward pass, they do to the loss
        with _replaced(head, lambda hidden: of_each_token(hidden, logits_of).view(1, 1, 1)):
            scalar: Tensor = model(**inputs, use_cache=False).logits
        if scalar.numel() != 1:
            raise ConfigError("model: expected a forward that calls the output head, found a compiled or fused one")
        return scalar.view(())


@contextlib.contextmanager
def _replaced(head: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`head` with another forward."""
    own = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def head_is_last(model: Any, inner: Any, ids: Tensor) -> bool:
    """Whether the logits of `ids` are what the output head returns, whatever that is. Call it in `evaluating`."""
    head = inner.get_output_embeddings()
    if head is None:
        return False
    logits_of, returned = head.forward, []

    def known(hidden: Tensor) -> Tensor:
        logits: Tensor = logits_of(hidden)
        # Far from 0, where soft-capping shows; and exact in every dtype.
        returned.append((torch.arange(logits.numel(), device=logits.device) % 255 - 127).view_as(logits).to(logits))
        return returned[-1]

    with _replaced(head, known):
        logits = model(input_ids=ids, use_cache=False).logits
    return len(returned) == 1 and torch.equal(returned[0].float(), logits.float())
