"""What each capture.k would keep of a teacher's distributions, and what that would cost: to choose k from data.

N rows, K ids at most.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.store.store import Store

_SAMPLED = (8, 16, 32)
"""The k of capture.method=sample that are compared."""

_PIECES = 64
_OF_TOKEN = 3.2  # the token itself, and next_logprob
_MEASURED = {
    ("topk", "portable"): (0.87, 0.45, 4.5),
    ("topk", "compact"): (0.76, 0.35, 4.1),
    ("sample", "portable"): (1.02, 0.44, 4.6),
    ("sample", "compact"): (0.93, 0.45, 4.1),
}
"""Of an id: bytes for each that it would take if all were equally likely; then bytes of its log-probability, of the two
columns of a temperature."""


class Choice:
    """Sums over the rows of a teacher: what of their probability is in the K most probable ids, and where the rest is.

    Of rows of a sample less is known: those ids that were kept, and that all others have less than each drawn one
    weighs. Where that is not enough, mass and entropy are the least that they may be, and ids of a sample the most.
    """

    def __init__(self, k: int, method: str = "topk", more: int = 0) -> None:
        """k: the most ids of a row. more: another k to compare as a sample."""
        self.method = method
        self._ks = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
        self.rows = self._targets = 0
        self._mass, self._entropy, self._ids, self._nll = np.zeros(len(self._ks)), 0.0, 0.0, 0.0
        self._sampled = {n: 0.0 for n in sorted({*_SAMPLED, more}) if 1 < n <= k}

    def add(
        self,
        ids: NDArray[np.integer],
        logprobs: NDArray[np.floating],
        tail: NDArray[np.floating],
        following: NDArray[np.floating],
    ) -> None:
        """Rows as a store has them: target_ids and target_logprobs [N, K], and tail_logprob at temperature 1 [N].

        following: [N], next_logprob; nan where no token follows, or one that is not learned from
        """
        known = following[~np.isnan(following)].astype(np.float64)
        self._nll, self._targets = self._nll - float(known.sum()), self._targets + len(known)
        p = np.nan_to_num(np.exp(logprobs.astype(np.float64)), nan=0.0)
        rest, num_ids = np.exp(tail.astype(np.float64)), (ids >= 0).sum(axis=1)
        self.rows += len(p)
        self._ids += float(num_ids.sum())
        self._mass += p.cumsum(axis=1)[:, [k - 1 for k in self._ks]].sum(axis=0)
        self._entropy += float(least_entropy(ids, logprobs, tail).sum())
        for k in self._sampled:
            expected = np.minimum(1, k * p).sum(axis=1) + k * rest
            self._sampled[k] += float(np.minimum(np.ceil(expected - 1e-6), np.minimum(k, num_ids)).sum())

    def expected_ids(self, method: str, k: int) -> float:
        """Ids in a row with this method and k, on average. Of a sample with a k that is compared."""
        return self._sampled[k] / max(1, self.rows) if method == "sample" else float(k)

    def lines(self, vocab_size: int, codec: str) -> dict[str, str]:
        """The figures in words, by the names of their lines; none without rows."""
        if not self.rows:
            return {}
        mass = ", ".join(f"{k}: {each / self.rows:.2f}" for k, each in zip(self._ks, self._mass, strict=True))
        found = {
            "mass of the top": f"{'at least ' if self.method == 'sample' else ''}{mass}",
            "entropy": f"at least {self._entropy / self.rows:.2f} nats",
        }
        if self.method == "sample":
            found["ids"] = f"{self._ids / self.rows:.1f} on average"
        if self._targets:
            found["teacher perplexity"] = f"{math.exp(min(self._nll / self._targets, 700)):.2f}"
        costs = {k: self.expected_ids("sample", k) for k in self._sampled}
        if costs:
            found["sampled with k"] = "; ".join(
                f"{k}: {ids:.1f} ids, {expected_bytes('sample', ids, vocab_size, 1, codec):.0f} bytes/token"
                for k, ids in costs.items()
            )
        return found

    @classmethod
    def of(cls, store: Store) -> "Choice":
        """What the committed blocks of a store say. Of a large store, some pieces at even distances are read."""
        k = int(store.attributes["k"])
        found = cls(k, store.attributes["method"], more=k)
        column, size = store.attributes["temperatures"].index(1.0), store.inner_rows
        per_block = store.block_rows // size
        there = np.flatnonzero(store.committed())
        pieces = len(there) * per_block
        for i in range(0, pieces, -(-pieces // _PIECES) or 1):
            start = (int(there[i // per_block]) * per_block + i % per_block) * size
            names = {"target_ids", "target_logprobs", "tail_logprob", "next_logprob", "loss_mask"}
            names = (names - (store.unknown - {"tail_logprob"})) & {*store.array_names()}
            rows = store.read_arrays([*names], start, start + size)
            tail = rows["tail_logprob"][:, column]
            used = ~np.isnan(tail)
            following = rows.get("next_logprob", np.full(size, np.nan, np.float16))
            if "loss_mask" in rows:
                following = np.where(rows["loss_mask"], following, np.nan)
            found.add(rows["target_ids"][used], rows["target_logprobs"][used], tail[used], following[used])
        return found


def expected_bytes(method: str, ids: float, vocab_size: int, num_temperatures: int, codec: str) -> float:
    """About the bytes of a token in a store of so many ids a row: as measured (docs/benchmarks.md, "Size")."""
    of_id, of_logprob, of_temperature = _MEASURED[method, codec]
    return ids * (of_id * math.log2(vocab_size) / 8 + of_logprob) + of_temperature * num_temperatures + _OF_TOKEN


def least_entropy(
    ids: NDArray[np.integer], logprobs: NDArray[np.floating], tail: NDArray[np.floating]
) -> NDArray[np.float64]:
    """[N] nats: the least that the entropy of each row may be, from rows as in `Choice.add`."""
    p, rest = np.nan_to_num(np.exp(logprobs.astype(np.float64)), nan=0.0), np.exp(tail.astype(np.float64))
    num_drawn = np.isnan(logprobs).sum(axis=1) - (ids < 0).sum(axis=1)
    least = np.where(np.isnan(logprobs), np.inf, p).min(axis=1)
    most = np.where(num_drawn > 0, rest / np.maximum(num_drawn, 1), np.minimum(least, rest))  # of an id of the rest
    entropy: NDArray[np.float64] = -_plogp(p).sum(axis=1) - rest * np.log(np.maximum(most, 1e-30))
    return entropy


def _plogp(p: NDArray[np.float64]) -> NDArray[Any]:
    return p * np.log(np.where(p > 0, p, 1.0))
