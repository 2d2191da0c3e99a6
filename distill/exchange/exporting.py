"""A store as a folder of Parquet files: which samples are in which, and one worker's share of them.

export.json                what the files follow from, and how many there are; there from the beginning on
part_000000.parquet, ...   a row for each sample, in the order of the store
README.md                  tells the library `datasets`, and a hub, which files are data
"""

import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from distill import __version__
from distill.config.exchange import ExportConfig
from distill.errors import ConfigError, StoreError
from distill.exchange.columns import SCHEMA, to_table
from distill.reading.index import Index
from distill.reading.samples import RowReader
from distill.run.board import Board
from distill.run.grid import Grid
from distill.run.parts import PartsFolder, PartsKind
from distill.run.watch import Watch
from distill.settings import to_yaml
from distill.store.location import Lock, refuse_inside_store
from distill.student.checkpoint import lock_output
from distill.teacher.summary import human, table
from distill.teacher.worker import Totals

logger = logging.getLogger(__name__)

_CARD = "README.md"
_KIND = PartsKind("distill-export", 1, "export.json", "part_{}.parquet", "export", ["samples", "tokens"])
_ENTRIES = 1 << 22
"""Ids of a row group, about: what a worker holds in memory at a time."""


class Source:
    """The store that is exported, and its parts: ranges of samples.

    parts: [P + 1], the first sample of each part, and the number of samples
    """

    def __init__(self, config: ExportConfig) -> None:
        """Raises StoreError where there is no store, or one that is not complete."""
        self._reader = RowReader(config.store.path, config.store.options)
        self.store = self._reader.store
        if not self.store.complete:
            there = self.store.committed()
            raise StoreError(
                f"store.path: expected a complete store, found {there.sum()} of {len(there)} blocks in "
                f"{self._reader.path}: run the command that makes it again, to its end"
            )
        self.attributes = self.store.attributes
        self.index = Index.of(self.store)
        self.parts = self._cut(config.part_tokens)

    def _cut(self, part_tokens: int) -> list[int]:
        parts, tokens = [0], 0
        for start, stop in self.index.pieces(self.store.block_rows).tolist():
            if tokens >= part_tokens:
                parts.append(start)
                tokens = 0
            lengths = np.cumsum(self.index.spans(start, stop)[1], dtype=np.int64) + tokens
            begun = 0
            while (at := int(np.searchsorted(lengths, part_tokens + begun))) + 1 < len(lengths):  # a large piece
                parts.append(start + at + 1)
                begun = int(lengths[at])
            tokens = int(lengths[-1]) - begun
        return [*parts, len(self.index)]

    def settings(self, config: ExportConfig) -> dict[str, Any]:
        """What the files follow from, as a flat mapping: the store's own digest, and settings."""
        return {
            "store.digest": self.attributes["digest"],
            "store.fingerprint": self.attributes["fingerprint"],
            "align": config.align,
            "part_tokens": config.part_tokens,
        }

    def tokens(self, part: int) -> int:
        """The number of tokens of a part."""
        return int(self.index.spans(self.parts[part], self.parts[part + 1])[1].sum(dtype=np.int64))

    def tables(self, part: int, align: str) -> Iterator[tuple[pa.Table, int]]:
        """The samples of a part, a few at a time, as a table each; and how many tokens they have."""
        first, end = self.parts[part], self.parts[part + 1]
        column = self.attributes["temperatures"].index(1.0)
        rows_at_once = max(1, _ENTRIES // int(self.attributes["k"]))
        while first < end:
            starts, lengths = self.index.spans(first, end if end - first < rows_at_once else first + rows_at_once)
            block = starts // self.store.block_rows
            near = (block == block[0]) & (starts + lengths - starts[0] <= rows_at_once)
            count = max(1, len(near) if near.all() else int(np.argmin(near)))
            rows = self._reader.read(int(starts[0]), int(starts[count - 1] + lengths[count - 1]))
            lengths = lengths[:count]
            yield to_table(_in_use(rows, starts[:count], lengths), lengths, column, align), int(lengths.sum())
            first += count


def _in_use(rows: dict[str, NDArray[Any]], starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> dict[str, Any]:
    """The rows of samples only: there may be empty ones between them, in stores of other programs."""
    if int(lengths.sum(dtype=np.int64)) == len(rows["tokens"]):
        return rows
    spans = zip(starts - starts[0], lengths, strict=True)
    at = np.concatenate([np.arange(start, start + length) for start, length in spans])
    return {name: values[at] for name, values in rows.items()}


class Job(NamedTuple):
    """What there is to do, the same for all workers. missing: parts. lock: of the folder, which worker 0 holds."""

    source: Source
    folder: PartsFolder
    missing: list[int]
    lock: Lock | None

    def tokens(self) -> tuple[int, int]:
        """How many there are, and how many are exported."""
        total = int(self.source.attributes["num_tokens"])
        return total, total - sum(map(self.source.tokens, self.missing))


def plan_job(config: ExportConfig, grid: Grid, board: Board) -> Job | None:
    """Open the store; worker 0 begins the folder, or finds what is there, and tells the others. None: all is there.

    Raises UserError, also where this worker does not see the folder that worker 0 has made.
    """
    source, output = Source(config), Path(config.output)
    if grid.rank > 0:
        if not (note := board.wait("job")):
            return None
        folder = PartsFolder(output, _KIND)
        if folder.manifest is None:
            raise ConfigError(f"output: worker 0 began {output}, worker {grid.rank} does not see it")
        return Job(source, folder, json.loads(note), None)
    refuse_inside_store(output, "output")
    lock = lock_output(output)
    folder, settings = PartsFolder(output, _KIND), source.settings(config)
    if folder.manifest is not None:
        folder.check(settings)
    folder.clean()
    found = source.attributes
    if folder.manifest is None:
        folder.begin(
            len(source.parts) - 1, samples=found["num_samples"], tokens=found["num_tokens"], method=found["method"],
            teacher=found["teacher"], tokenizer=found["tokenizer"], vocab_size=found["vocab_size"], config=settings,
            versions={"distill": __version__, "pyarrow": importlib.metadata.version("pyarrow")},
        )  # fmt: skip
    folder.write(output / _CARD, lambda file: file.write(_card(found, config.align).encode()))
    missing = folder.missing()
    if not missing:
        board.note("job", "")
        logger.info("%s is complete already: nothing to do", output)
        logger.info(summary(folder, config))
        return None
    (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
    total = len(source.parts) - 1
    logger.info("%d of %d parts of about %s tokens are there", total - len(missing), total, f"{config.part_tokens:,}")
    if len(missing) < grid.world_size:
        idle = grid.world_size - len(missing)
        logger.warning(
            "%d of %d workers have nothing to do: smaller parts (part_tokens) are for more workers",
            idle, grid.world_size,
        )  # fmt: skip
    board.note("job", json.dumps(missing))
    return Job(source, folder, missing, lock)


class Worker:
    """Does the parts that are dealt to it. What it holds is of one row group, however large a part is."""

    def __init__(self, config: ExportConfig, job: Job, board: Board, watch: Watch) -> None:
        self._align, self._job, self._board, self._watch = config.align, job, board, watch
        self.totals = Totals()
        self._began = time.monotonic()

    def work(self, dealt: list[int]) -> None:
        """Write each of these parts."""
        self._began = time.monotonic()
        for part in dealt:
            self._watch.beat()
            self._job.folder.write(self._job.folder.file(part), partial(self._fill, part=part))
            logger.info("part %d is finished", part, extra={"console": False})
        self.totals.seconds = time.monotonic() - self._began

    def progress(self) -> tuple[int, str]:
        """For the progress bar: the tokens that all workers have exported in this run."""
        return self._board.add("tokens", 0), ""

    def _fill(self, file: IO[bytes], part: int) -> None:
        with pa.parquet.ParquetWriter(file, SCHEMA, compression="zstd", compression_level=3, version="2.6") as writer:
            for rows, tokens in self._job.source.tables(part, self._align):
                writer.write_table(rows)
                self._watch.beat()
                self.totals.tokens += tokens
                self._board.add("tokens", tokens)


def summary(folder: PartsFolder, config: ExportConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: what the folder has, how fast it came, and how to read it."""
    made = folder.manifest
    assert made is not None
    size = sum(folder.file(part).stat().st_size for part in range(made["parts"]))
    lines = {
        "samples": f"{made['samples']:,}",
        "tokens": f"{made['tokens']:,}",
        "size": f"{human(size)} in {made['parts']} files, {size / made['tokens']:.0f} bytes/token",
        "rows": "row t of the targets is about token " + ("t+1, as logits t are" if config.align == "logits" else "t"),
    }
    if totals is not None and totals.tokens:
        lines["speed"] = f"{totals.tokens / totals.seconds:,.0f} tokens/s"
    lines |= {"folder": str(folder.folder), "logs": config.log_dir}
    lines["next"] = f'datasets.load_dataset("{folder.folder}"); docs/interchange.md'
    return "\n" + table(lines)


def _card(found: dict[str, Any], align: str) -> str:
    """A dataset card: what `datasets` and a hub show, and which files they read."""
    about = "token t+1, as the logits of position t are" if align == "logits" else "token t"
    kept = (
        f"the {found['k']} most probable ids of each row, with their log-probabilities over the whole vocabulary"
        if found["method"] == "topk"
        else f"an unbiased sample of at most {found['k']} ids of each row, with the logs of their weights"
    )
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part_*.parquet\n---\n\n"
        f"What {found['teacher']['model']} says of {found['num_samples']:,} samples, {found['num_tokens']:,} tokens:\n"
        f"{kept}.\n"
        f"Row t of `target_token_ids`, `target_logprobs` and `target_mask` is about {about}.\n"
        "Made by distill.export.\n"
    )
