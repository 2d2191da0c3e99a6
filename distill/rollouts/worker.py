"""One worker's share of the work: its parts, from prompts to files."""

import logging
import time
from typing import Any

from distill.config.rollout import RolloutConfig
from distill.rollouts.parts import Row
from distill.rollouts.prepare import Job
from distill.rollouts.sampling import Sampler
from distill.run.board import Board
from distill.run.watch import Watch
from distill.teacher.worker import Totals

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5


class Worker:
    """Does the parts that are dealt to it."""

    def __init__(self, config: RolloutConfig, job: Job, tokenizer: Any, board: Board, watch: Watch) -> None:
        self._config, self._job, self._tokenizer, self._board, self._watch = config, job, tokenizer, board, watch
        self.totals = Totals()
        self._open, self._untold = 0, [0, 0]
        self._told = self._began = time.monotonic()

    def work(self, sampler: Sampler, dealt: list[int]) -> None:
        """Write each of these parts, from its prompts to its file."""
        self._began = time.monotonic()
        for part in dealt:
            rows = self._rows(sampler, part)
            self._job.parts.write_part(part, rows)
            logger.info("part %d is finished: %d rollouts", part, len(rows), extra={"console": False})
        self.totals.seconds = time.monotonic() - self._began

    def progress(self) -> tuple[int, str]:
        """For the progress bar: how many rollouts all workers have ended in this run, and tokens per second."""
        seconds = time.monotonic() - self._began
        return self._board.add("rollouts", 0), f"{self._board.add('tokens', 0) / seconds:,.0f} tok/s"

    def _rows(self, sampler: Sampler, part: int) -> list[Row]:
        """The rollouts of one part, prompt after prompt."""
        prompts, size, n = self._job.prompts, self._config.batch.part_prompts, self._config.sampling.n
        which = [(i, sample) for i in range(part * size, min(len(prompts), (part + 1) * size)) for sample in range(n)]
        texts = [prompts[i] for i, _ in which]
        rows: dict[int, Row] = {}
        for batch in sampler.batches([len(text) for text in texts]):
            self._watch.beat()
            numbers = [(int(prompts.numbers[which[j][0]]), which[j][1]) for j in batch]
            self._open = len(batch)
            found = sampler.write([texts[j] for j in batch], numbers, self._heard)
            self._heard(0, self._open, now=True)  # those that reached their limit
            for j, number, rollout in zip(batch, numbers, found, strict=True):
                said = rollout.ids[:-1] if rollout.finished else rollout.ids
                text = self._tokenizer.decode(said.tolist(), clean_up_tokenization_spaces=False)
                rows[j] = Row(texts[j], rollout.ids, rollout.logprobs, text, *number, rollout.finished)
                self.totals.tokens += len(rollout.ids)
        return [rows[j] for j in range(len(which))]

    def _heard(self, written: int, over: int, now: bool = False) -> None:
        """Tell the others how many tokens were written and how many rollouts ended, but not at every step."""
        self._untold[0] += written
        self._untold[1] += over
        self._open -= over
        if now or time.monotonic() - self._told > _REPORT_SECONDS:
            for name, count in zip(("tokens", "rollouts"), self._untold, strict=True):
                self._board.add(name, count)
            self._untold, self._told = [0, 0], time.monotonic()
