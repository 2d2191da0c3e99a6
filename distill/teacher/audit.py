"""Is a store what its teacher says? The teacher runs again on some of the batches that the store was made of.

N rows, V vocabulary, K kept ids, n temperatures.

The divergence of a row is sum p log(p / q) - p + q over the K kept ids and one bucket for all others, drawn ones too:
of the store's p, which are rounded, from the teacher's q, which are not. Beside it stands that of the teacher's own
rows in batches of another shape, rounded as a store's are: what rounding and batch shapes alone explain. A store that
this teacher has made differs by no more; rows of other tokens, other samples or other weights differ by far more.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config.generate import BatchConfig, CaptureConfig, GenerateConfig, TeacherConfig
from distill.data.plan import batches
from distill.errors import ConfigError, StoreError, TeacherError
from distill.run.device import pick_device
from distill.store.store import Store
from distill.teacher.capture import Captured, as_float16, round_logprobs
from distill.teacher.loading import load_here
from distill.teacher.method import capture
from distill.teacher.model import Teacher
from distill.teacher.prepare import find
from distill.teacher.sample import uniforms
from distill.teacher.summary import table

FACTOR = 3.0
"""How many times as much as between two batch shapes a store may differ from its teacher: devices round differently."""

_SLACK = (1e-6, 1e-5, np.inf, 0.01, 0.01, 0.01, 0.01)
_FEWEST_BATCHES = 4


@dataclass(frozen=True)
class Figures:
    """How far two runs are apart, over all rows looked at.

    mean, high, largest: the divergence: its mean, its 99th percentile, its largest, in nats
    kept, first:         the shares that do not agree: of a row's ids, drawn ones too, and of the most probable ids
    logsumexp, following: the largest difference; following: of next_logprob
    """

    mean: float
    high: float
    largest: float
    kept: float
    first: float
    logsumexp: float
    following: float


@dataclass(frozen=True)
class Audit:
    """What an audit has found.

    teacher:   the model, its dtype and its device. other: which of the teacher's files are not those of the store
    store:     between the store and this teacher. shapes: between two batch shapes of this teacher
    """

    teacher: str
    other: list[str]
    blocks: int
    samples: int
    rows: int
    store: Figures
    shapes: Figures

    @property
    def limits(self) -> Figures:
        """The most by which a store that this teacher has made differs; the largest divergence has no limit."""
        return Figures(*(FACTOR * each + more for each, more in zip(astuple(self.shapes), _SLACK, strict=True)))

    @property
    def ok(self) -> bool:
        """Whether the store says what this teacher says."""
        pairs = zip(astuple(self.store), astuple(self.limits), strict=True)
        return all(found <= limit for found, limit in pairs)  # NaN is not


def audit(
    store: Store,
    model: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    num_samples: int = 64,
    seed: int = 0,
    progress: Callable[[int], object] = abs,
) -> Audit:
    """Run the teacher of `store` again on about `num_samples` random samples, and compare.

    model: where the teacher is now, if not where it was. device: as teacher.device. Code of the model's own runs only
    with trust_remote_code. progress: called with the number of rows after each batch.
    Raises TeacherError where the teacher cannot be found, or loaded on this machine; StoreError where the store is
    damaged, or has no committed block.
    """
    made = store.attributes["config"]
    settings = TeacherConfig(
        model=model or store.attributes["teacher"]["model"],
        dtype=made["teacher.dtype"],
        device=device,
        revision=None if model else store.attributes["teacher"]["revision"],
        trust_remote_code=trust_remote_code,
        attn_implementation=made["teacher.attn_implementation"],
    )
    max_tokens = int(made["batch.max_tokens"])
    with tempfile.TemporaryDirectory() as offload:
        teacher, fingerprint, where = _load(settings, max_tokens, Path(offload))
        if teacher.vocab_size != store.attributes["vocab_size"]:
            raise TeacherError(
                f"teacher.model: expected a vocabulary of {store.attributes['vocab_size']:,} as the store has, found "
                f"{teacher.vocab_size:,} in {settings.model}"
            )
        found: list[tuple[Tensor, Tensor]] = []
        blocks, samples = set(), 0
        for block, batch in _choose(store, max_tokens, teacher.rope_switch, num_samples, seed):
            found.append(_compare(store, teacher, batch))
            blocks.add(block)
            samples += len(batch)
            progress(sum(map(len, batch)))
    stored, shapes = (_figures(parts) for parts in zip(*found, strict=True))
    compared = {name: ours for name, ours in fingerprint.items() if name in made or not store.unknown}
    other = [name for name, ours in sorted(compared.items()) if made.get(name) != ours]
    return Audit(
        f"{settings.model} ({settings.dtype}, on {where.type})", other, len(blocks), samples,
        sum(len(part) for part, _ in found), stored, shapes,
    )  # fmt: skip


def report(found: Audit) -> str:
    """An audit in words: the figures side by side, and the verdict."""
    names = {
        "divergence, mean": "{:.2e}",
        "99th percentile": "{:.2e}",
        "largest": "{:.2e}",
        "kept ids that differ": "{:.4%}",
        "first ids that differ": "{:.4%}",
        "logsumexp, largest difference": "{:.2e}",
        "next_logprob, largest": "{:.2e}",
    }
    columns = [astuple(figures) for figures in (found.store, found.shapes, found.limits)]
    lines = [f"{'':29}{'the store':>14}{'batch shapes':>14}{'at most':>14}"]
    for i, (name, form) in enumerate(names.items()):
        shown = [form.format(column[i]) if column[i] < np.inf else "any" for column in columns]
        lines.append(f"{name:29}" + "".join(f"{text:>14}" for text in shown))
    other = f"not the files of the store: {', '.join(found.other)} differ" if found.other else "the files of the store"
    looked = f"{found.rows:,} rows of {found.samples:,} samples in {found.blocks:,} blocks"
    verdict = "the store says what this teacher says" if found.ok else "THE STORE IS NOT WHAT THIS TEACHER SAYS"
    head = table({"teacher": f"{found.teacher}: {other}", "compared": looked})
    return "\n".join([head, *lines, f"{verdict}: {_why(found)}"])


def _why(found: Audit) -> str:
    if found.ok:
        return f"it differs by at most {FACTOR:g} times what rounding and batch shapes explain"
    pairs = zip(vars(found.store).items(), astuple(found.limits), strict=True)
    return f"beyond the limit: {', '.join(name for (name, value), limit in pairs if not value <= limit)}"


def _load(settings: TeacherConfig, max_tokens: int, offload: Path) -> tuple[Teacher, Mapping[str, str], torch.device]:
    """The teacher on this machine's device or devices, what identifies it, and its first device."""
    try:
        device = pick_device("teacher.device", settings.device, 0, 1)
        source, needs = find(GenerateConfig(teacher=settings, batch=BatchConfig(max_tokens)), device)
        model, share = load_here(source, needs, device, offload)
    except ConfigError as error:
        raise TeacherError(str(error)) from error
    return Teacher(model, device, share), source.fingerprint, device


def _choose(
    store: Store, max_tokens: int, switch: int | None, num_samples: int, seed: int
) -> Iterator[tuple[int, list[range]]]:
    """(block, batch): random batches of random committed blocks, as distill.generate makes them: the rows of samples.

    At least `num_samples` samples, and a few batches, one of each block in turn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    blocks = [int(block) for block in rng.permutation(np.flatnonzero(store.committed()))[:num_samples]]
    if not blocks:
        raise StoreError(f"{store.path}: expected a committed block to compare the teacher with, found none")
    waiting: dict[int, list[list[range]]] = {}
    num_seen = num_batches = 0
    while blocks:
        for block in blocks:
            if block not in waiting:
                found = _batches(store, block, max_tokens, switch)
                waiting[block] = [found[i] for i in rng.permutation(len(found))]
            batch = waiting[block].pop()
            yield block, batch
            num_seen, num_batches = num_seen + len(batch), num_batches + 1
            if num_seen >= num_samples and num_batches >= _FEWEST_BATCHES:
                return
        blocks = [block for block in blocks if waiting[block]]


def _batches(store: Store, block: int, max_tokens: int, switch: int | None) -> list[list[range]]:
    """The batches of a block, as the rows of their samples."""
    samples = store.samples_of(block)
    starts = store.read_rows("sample_start", samples.start, samples.stop)
    lengths = store.read_rows("sample_length", samples.start, samples.stop)
    found = batches(lengths, max_tokens, switch)
    return [[range(int(starts[i]), int(starts[i] + lengths[i])) for i in batch] for batch in found]


def _compare(store: Store, teacher: Teacher, batch: Sequence[range]) -> tuple[Tensor, Tensor]:
    """How far the store, and this teacher in another batch shape, are from the teacher in this batch: [N, 5] each."""
    found = store.attributes
    temperatures = found["temperatures"]
    settings = CaptureConfig(found["method"], found["k"], temperatures, found["config"]["capture.seed"])
    draws = [uniforms(settings.seed, rows.start, len(rows)) for rows in batch]
    read = [store.read_arrays(("tokens", *store.captured), rows.start, rows.stop) for rows in batch]
    tokens = [rows["tokens"] for rows in read]
    following = torch.from_numpy(np.concatenate([np.append(each[1:], -1) for each in tokens])).long()
    told = [name for name in store.captured if name != "next_logprob" or name not in store.unknown]
    stored = _Rows.read({name: np.concatenate([rows[name] for rows in read]) for name in told})
    partial = bool(store.unknown)
    said = (stored.ids[:, 0] >= 0) | (not partial)  # others may have captured nothing of a row
    if (
        (stored.ids[:, 0] < 0)[said].any()
        or ((stored.ids < 0) & ~stored.logprobs.isnan()).any()
        or (stored.ids >= teacher.vocab_size).any()
    ):
        raise StoreError(f"{store.path}: damaged: target_ids, rows {batch[0].start} to {batch[0].stop}, and others")
    others = [[i] for i in range(len(batch))] if len(batch) > 1 else [[0, 0]]
    parts = [
        teacher.capture([tokens[i] for i in other], settings, np.concatenate([draws[i] for i in other]))
        for other in others
    ]
    other = _Rows.of(Captured.concatenate([part for part in parts if part is not None])).part(0, len(stored.ids))
    column, at, u = temperatures.index(1.0), 0, torch.from_numpy(np.concatenate(draws))
    differences: tuple[list[Tensor], list[Tensor]] = [], []
    for logits in teacher.logits(tokens):  # [n, V]
        runs = [rows.part(at, at + len(logits)) for rows in (stored, other)]
        here = said[at : at + len(logits)]
        divergences = [_divergence(logits, rows, column, partial or settings.method == "sample") for rows in runs]
        own = capture(
            logits,
            settings,
            following[at : at + len(logits)].to(logits.device),
            u[at : at + len(logits)].to(logits.device),
        )
        assert own is not None
        for into, rows, divergence in zip(differences, runs, divergences, strict=True):
            after = following[at : at + len(logits)] if partial else None
            into.append(torch.stack([divergence, *_differences(rows, own, after)], dim=1)[here])
        at += len(logits)
    return torch.cat(differences[0]), torch.cat(differences[1])


@dataclass(frozen=True)
class _Rows:
    """N rows as a store has them, on the CPU: rounded."""

    ids: Tensor
    logprobs: Tensor
    logsumexp: Tensor
    tail: Tensor
    following: Tensor

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]]) -> "_Rows":
        """The captured arrays of a store; next_logprob may not be there, or be unknown."""
        found = {name: torch.from_numpy(values) for name, values in arrays.items()}
        nothing = torch.full((len(found["logsumexp"]),), torch.nan)
        return cls(
            found["target_ids"], found["target_logprobs"], found["logsumexp"], found["tail_logprob"],
            found.get("next_logprob", nothing),
        )  # fmt: skip

    @classmethod
    def of(cls, captured: Captured) -> "_Rows":
        """What a store has of captured rows."""
        rounded = [round_logprobs(x.numpy()) for x in (captured.target_logprobs, captured.tail_logprob)]
        logprobs, tail = map(torch.from_numpy, rounded)
        following = torch.from_numpy(as_float16(captured.next_logprob.numpy()))
        return cls(captured.target_ids, logprobs, captured.logsumexp, tail, following)

    def part(self, start: int, stop: int) -> "_Rows":
        """The rows [start, stop)."""
        return _Rows(*(values[start:stop] for values in vars(self).values()))


def _divergence(logits: Tensor, rows: _Rows, column: int, sampled: bool) -> Tensor:
    """Of `rows` from the distributions of `logits` [n, V] at temperature 1, [n] float64. column: of that.

    sampled: ids without a log-probability were drawn, or are none. Where the tail is unknown, of the ids alone.
    """
    known = ~rows.logprobs.isnan() | (not sampled)
    known[:, 0] = True
    ids = torch.where(known, rows.ids, rows.ids[:, :1]).long().clamp(min=0).to(logits.device)
    everything = logits.logsumexp(dim=1).double()
    kept = (logits.gather(1, ids).double() - everything[:, None]).masked_fill(~known.to(logits.device), -torch.inf)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1).double() - everything
    q = torch.cat([kept, rest[:, None]], dim=1).cpu()  # [n, K + 1]
    p = torch.cat([rows.logprobs.masked_fill(~known, -torch.inf), rows.tail[:, [column]]], dim=1).double()
    if (alone := rows.tail[:, column].isnan()).any():
        p, q = (torch.where(alone[:, None], _of_ids(part), part) for part in (p, q))
    return (torch.where(p == -torch.inf, 0, p.exp() * (p - q)) - p.exp() + q.exp()).sum(dim=1)


def _of_ids(logprobs: Tensor) -> Tensor:
    """[n, K + 1]: the log-probabilities of K ids, scaled to a sum of 1; of all others none."""
    scaled = logprobs[:, :-1].log_softmax(dim=1)
    return torch.cat([scaled, torch.full_like(logprobs[:, -1:], -torch.inf)], dim=1)


def _differences(rows: _Rows, own: Captured, following: Tensor | None) -> tuple[Tensor, ...]:
    """Of `rows` and what was captured, [n] float64 each.

    following: [n], the ids that follow, where `rows` may have fewer ids than were captured, but that one in any case
    The shares of other ids and of other first ids; then how far logsumexp and the token that follows are apart.
    """
    ids, logsumexp = own.target_ids.cpu(), own.logsumexp.cpu()
    theirs = rows.ids if following is None else rows.ids.masked_fill(rows.ids == following[:, None], -1)
    both = torch.cat([theirs, ids], dim=1).sort(dim=1).values  # in each of the two an id is there once
    same = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(dim=1)
    most = (theirs >= 0).sum(dim=1)
    most = torch.maximum(most, (ids >= 0).sum(dim=1)) if following is None else most
    same, most = torch.where(most == 0, 1, same), most.clamp(min=1)
    first = rows.ids[:, 0] != ids[:, 0]
    apart = (rows.following.double() - own.next_logprob.cpu().double()).abs().nan_to_num(0.0, posinf=torch.inf)
    scale = (rows.logsumexp - logsumexp).abs().amax(dim=1).double()
    if following is not None:  # others may not know the one, and have taken the other from what a store has rounded
        scale = scale.nan_to_num(0.0)
        apart = (apart - 2**-6 * own.next_logprob.cpu().double().abs().nan_to_num(0.0)).clamp(min=0)
    return 1 - same.double() / most, first.double(), scale, apart


def _figures(parts: Sequence[Tensor]) -> Figures:
    divergence, kept, first, logsumexp, following = torch.cat(list(parts)).numpy().T
    return Figures(
        mean=float(divergence.mean()),
        high=float(np.quantile(divergence, 0.99)),
        largest=float(divergence.max()),
        kept=float(kept.mean()),
        first=float(first.mean()),
        logsumexp=float(logsumexp.max()),
        following=float(following.max()),
    )
