"""One worker's share of the work: its blocks, from tokens to commits.

N rows of a batch, K kept ids, n temperatures.
"""

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config.generate import GenerateConfig
from distill.data.plan import batches
from distill.errors import NumericalError
from distill.run.board import Board
from distill.run.watch import Watch
from distill.store.writable import WritableStore
from distill.teacher.capture import Captured, as_float16, round_logprobs
from distill.teacher.model import Teacher
from distill.teacher.sample import uniforms

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """What was done in this run, by one worker or by all.

    seconds: of the slowest worker
    """

    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def add_up(cls, parts: Sequence[str]) -> "Totals":
        """The totals of all workers, from their JSON."""
        found = [cls(**json.loads(part)) for part in parts]
        return cls(sum(part.tokens for part in found), max(part.seconds for part in found))


class Worker:
    """Does the blocks that are dealt to it.

    What it holds is of two blocks, however large the store is.

    num_missing: how many blocks all workers together are to do; dealt: those of this worker
    """

    def __init__(
        self, config: GenerateConfig, store: WritableStore, teacher: Teacher, board: Board, watch: Watch,
        num_missing: int, dealt: list[int],
    ) -> None:  # fmt: skip
        self._config, self._store, self._board, self._teacher, self._watch = config, store, board, teacher, watch
        self.totals = Totals()
        self._blocks = dealt
        there = store.num_blocks - num_missing
        logger.info("%d of %d blocks are there; this worker does %d", there, store.num_blocks, len(dealt))

    def work(self) -> None:
        """Run the teacher over each block. Meanwhile the block before is written and committed."""
        began = time.monotonic()
        writing: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
            for block in self._blocks:
                arrays = self._forward(block)
                if writing is not None:
                    writing.result()  # at most one block waits in memory; an error of the writer surfaces here
                if self._teacher.captures:
                    writing = writer.submit(self._write, block, arrays)
            if writing is not None:
                writing.result()
        self._teacher.close()
        self.totals.seconds = time.monotonic() - began

    def progress(self) -> tuple[int, str]:
        """For the progress bar: the tokens that all workers have done in this run, and the bytes per token written."""
        tokens, written = self._board.add("tokens written", 0), self._board.add("bytes written", 0)
        return self._board.add("tokens", 0), f"{written / tokens:.0f} B/tok" if tokens else ""

    def _forward(self, block: int) -> dict[str, NDArray[Any]]:
        """The captured arrays of one block, up to its last row in use; only fill where another worker captures."""
        samples = self._store.samples_of(block)
        lengths = self._store.read_rows("sample_length", samples.start, samples.stop)
        first = block * self._store.block_rows
        starts = self._store.read_rows("sample_start", samples.start, samples.stop) - first
        ends = starts + lengths
        tokens = self._store.read_rows("tokens", first, first + int(ends[-1]))
        capture = self._config.capture
        u = uniforms(capture.seed, first, int(ends[-1]))
        k, num_temperatures = capture.k, len(capture.temperatures)
        arrays = {
            "target_ids": np.full((ends[-1], k), -1, np.int32),
            "target_logprobs": np.full((ends[-1], k), np.nan, np.float16),
            "logsumexp": np.full((ends[-1], num_temperatures), np.nan, np.float32),
            "tail_logprob": np.full((ends[-1], num_temperatures), np.nan, np.float16),
            "next_logprob": np.full(ends[-1], np.nan, np.float16),
        }
        for batch in batches(lengths, self._config.batch.max_tokens, self._teacher.rope_switch):
            self._watch.beat()
            rows = [np.arange(starts[i], ends[i]) for i in batch]
            at = np.concatenate(rows)
            captured = self._teacher.capture([tokens[span] for span in rows], capture, u[at])
            if captured is None:
                continue
            self._check_finite(captured, batch + samples.start, lengths[batch])
            arrays["target_ids"][at] = captured.target_ids.numpy()
            arrays["target_logprobs"][at] = round_logprobs(captured.target_logprobs.numpy())
            arrays["logsumexp"][at] = captured.logsumexp.numpy()
            arrays["tail_logprob"][at] = round_logprobs(captured.tail_logprob.numpy())
            arrays["next_logprob"][at] = as_float16(captured.next_logprob.numpy())
            self.totals.tokens += len(at)
            self._board.add("tokens", len(at))
        return arrays

    def _check_finite(self, captured: Captured, samples: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
        """Raise NumericalError at the first row whose logits are NaN or infinite, of these samples of these lengths."""
        bad = torch.nonzero(~captured.logsumexp.isfinite().all(dim=1))
        if not len(bad):
            return
        ends = np.cumsum(lengths)
        at = int(np.searchsorted(ends, int(bad[0]), "right"))
        sample, position = int(samples[at]), int(bad[0]) - int(ends[at] - lengths[at])
        example = self._store.read_rows("sample_index", sample, sample + 1)[0]
        raise NumericalError(
            f"the teacher's logits are NaN or infinite at position {position} of sample {sample} "
            f"(example {example} of the dataset); expected finite ones. Nothing of its block was written"
        )

    def _write(self, block: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Write the block's arrays, then its commit."""
        for name in self._store.captured:
            self._store.write_rows(name, block, arrays[name])
        num_rows = len(arrays["target_ids"])  # samples follow each other without gaps
        self._store.commit(block, num_rows)
        self._board.add("tokens written", num_rows)
        self._board.add("bytes written", self._store.block_bytes(block, [*self._store.captured, "tokens"]))
        logger.info("block %d is committed: %d rows", block, num_rows, extra={"console": False})
