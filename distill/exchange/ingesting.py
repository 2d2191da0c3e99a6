"""What others captured as a store: planned by worker 0, then written by all workers, block by block.

Worker 0 reads every row, and refuses what is wrong before anything is written. Then each worker reads all rows again,
and keeps those of its own blocks, in files that nobody else sees; so it holds one row in memory, and one block.
"""

import base64
import logging
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distill.config.data import DatasetConfig
from distill.config.exchange import IngestConfig
from distill.config.generate import TeacherConfig
from distill.data.dataset import Data
from distill.data.dataset import find as find_data
from distill.data.files import Row
from distill.data.form import Encoded
from distill.data.tokenize import Samples, Spool
from distill.errors import DataError
from distill.exchange.captured import CapturedReader, Example
from distill.run.board import Board
from distill.run.grid import Grid
from distill.run.watch import Watch
from distill.settings import to_yaml
from distill.store.writable import WritableStore
from distill.teacher.capture import as_float16, round_logprobs
from distill.teacher.prepare import create_store, facts_of, find_store, place_samples, replan, store_of_worker_0
from distill.teacher.source import Source, locate
from distill.teacher.summary import human, table
from distill.teacher.worker import Totals

logger = logging.getLogger(__name__)


class Rows:
    """The rows of the dataset. reader: what they mean."""

    def __init__(self, config: IngestConfig, source: Source) -> None:
        """Raises DataError where there are none, or their columns mean nothing."""
        wanted = config.dataset
        self.data: Data = find_data(
            DatasetConfig(
                path=wanted.path, name=wanted.name, split=wanted.split, data_files=wanted.data_files,
                max_samples=wanted.max_samples,
            )
        )  # fmt: skip
        columns = self.data.columns()
        if not columns:
            raise DataError(f"dataset.path: expected rows in {self.data.name}, found none")
        self.reader = CapturedReader(columns, source.vocab_size, self.data.name, wanted.align)

    def __iter__(self) -> Iterator[Row]:
        return islice(self.data.rows(self.reader.columns), self.data.config.max_samples)


class Job(NamedTuple):
    """What there is to do, the same for all workers. missing: blocks. align: as dataset.align, but never auto."""

    rows: Rows
    store: WritableStore
    missing: list[int]
    align: str

    def tokens(self) -> tuple[int, int]:
        """How many there are, and how many are there."""
        total = int(self.store.attributes["num_tokens"])
        return total, total - int(self.store.tokens_per_block()[self.missing].sum())


def find(config: IngestConfig) -> Source:
    """The teacher's tokenizer and configuration. Raises TeacherError where they cannot be found."""
    return locate(TeacherConfig(**vars(config.teacher)), weights=False)


def plan_job(config: IngestConfig, grid: Grid, board: Board, source: Source) -> Job | None:
    """Worker 0 finds or makes the store, and tells the others. None: the store is complete.

    Raises UserError, also where this worker does not see the store that worker 0 has made.
    """
    rows = Rows(config, source)
    if grid.rank > 0:
        if not (note := board.wait("job")):
            return None
        made = store_of_worker_0(config.store, grid.rank)
        return Job(rows, made, _unpacked(note, made.num_blocks), made.attributes["captured"]["align"])
    fingerprint = fingerprint_of(config, source, rows.data)
    store = find_store(config.store, fingerprint)
    if store is not None and not store.complete and not store.plan_is_whole:
        logger.warning("%s lacks parts of its plan: they are written again from the dataset", config.store.path)
        samples = Planned.of(rows, store.attributes["captured"]["align"]).samples
        assert samples is not None
        replan(store, samples, *place_samples(samples, config.seed, config.store.block_rows))
    if store is not None and store.complete:
        board.note("job", "")
        logger.info("%s is complete already: nothing to do", config.store.path)
        logger.info(summary(store, config))
        return None
    (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
    store = store or plan_store(config, source, rows, fingerprint)
    missing = store.missing_blocks()
    board.note("job", _packed(missing, store.num_blocks))
    return Job(rows, store, missing, store.attributes["captured"]["align"])


def _packed(missing: list[int], num_blocks: int) -> str:
    there = np.ones(num_blocks, np.bool_)
    there[missing] = False
    return base64.b85encode(zlib.compress(np.packbits(there).tobytes(), 1)).decode()


def _unpacked(note: str, num_blocks: int) -> list[int]:
    packed = np.frombuffer(zlib.decompress(base64.b85decode(note)), np.uint8)
    found: list[int] = np.flatnonzero(np.unpackbits(packed, count=num_blocks) == 0).tolist()
    return found


def fingerprint_of(config: IngestConfig, source: Source, data: Data) -> dict[str, Any]:
    """The settings and the contents of files that determine the store's bytes, as a flat mapping.

    What distill.verify --teacher asks for beside them is as in distill.generate's defaults.
    """
    settings = {f"dataset.{key}": value for key, value in vars(config.dataset).items() if key not in _OUTSIDE}
    return {
        **{name: value for name, value in source.fingerprint.items() if name != "teacher.weights"},
        **data.identity,
        **settings,
        "teacher.dtype": "auto",
        "teacher.attn_implementation": None,
        "batch.max_tokens": 16384,
        "capture.seed": config.seed,
        "store.block_rows": config.store.block_rows,
        "store.codec": config.store.codec,
    }


_OUTSIDE = {"path", "data_files"}  # their contents are in the data's identity


@dataclass
class Planned:
    """What worker 0 learns from all rows.

    samples: all examples; without a mask where every token is trained on. k: entries of the widest row. masked:
    whether there are tokens that are not trained on. renormalized: whether the entries of every row add up to 1.
    followed: whether every row names the token that really follows. hits, misses: rows that do, and rows that name the
    one that would, were the rows aligned otherwise
    """

    align: str
    samples: Samples | None = None
    k: int = 1
    dropped: int = 0
    masked: bool = False
    renormalized: bool = True
    followed: bool = True
    hits: int = 0
    misses: int = 0

    @classmethod
    def of(cls, rows: Rows, align: str) -> "Planned":
        """Read all rows. Raises DataError for the first that is wrong, and where there is nothing to learn from."""
        found = cls(align)
        bar = tqdm(
            rows, "reading", unit=" examples", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True, delay=1.0,
        )  # fmt: skip
        with Spool(masked=True) as spool:
            for number, row in enumerate(bar):
                example = rows.reader.read(row, number, align)
                if example is None:
                    found.dropped += 1
                else:
                    spool.add(Encoded(example.tokens.tolist(), example.trained.tolist()), number)
                    found.add(example)
            samples = spool.samples()
        rows.data.check_unchanged()
        if not len(samples.lengths):
            raise DataError(f"dataset.path: expected tokens to learn from in {rows.data.name}, found none")
        found.samples = samples if found.masked else samples.without("loss_mask")
        return found

    def add(self, example: Example) -> None:
        """One more example with tokens to learn from."""
        self.k = max(self.k, int((example.ids >= 0).sum(axis=1).max()))
        self.masked |= not example.trained[1:].all()
        self.renormalized &= example.renormalized
        self.followed &= not np.isnan(example.following[:-1][example.said[:-1]]).any()
        self.hits += int((~np.isnan(example.following)).sum())
        shift = 2 if self.align == "token" else 0
        other = example.ids[: len(example.tokens) - shift] == example.tokens[shift:, None]
        self.misses += int(other.any(axis=1).sum())

    @property
    def looks_shifted(self) -> bool:
        """Whether rows name the token of the other alignment more often than chance explains."""
        return self.misses - self.hits > 4 * math.sqrt(self.misses + self.hits)


def plan_store(config: IngestConfig, source: Source, rows: Rows, fingerprint: dict[str, Any]) -> WritableStore:
    """Read all rows, and create the store with their tokens."""
    align, name = config.dataset.align, rows.data.name
    if rows.reader.form == "prompt_logprobs":
        if align == "logits":
            raise DataError("dataset.align: expected token or auto with prompt_logprobs, found logits")
        align = "token"
    elif align == "auto":
        align = rows.reader.align(iter(rows))
    found = Planned.of(rows, align)
    samples = found.samples
    assert samples is not None
    if found.looks_shifted:
        logger.warning(
            "%s rows of %s name the token that they are about, %s the one %s it: check dataset.align, found %s",
            f"{found.hits:,}", name, f"{found.misses:,}", "after" if align == "token" else "before", align,
        )  # fmt: skip
    known = {
        "logsumexp": False,
        "tail_logprob": not found.renormalized,
        "next_logprob": found.followed and not found.renormalized,  # else it may be scaled as its row is
    }
    unknown = [array for array, is_known in known.items() if not is_known]
    facts = {
        "method": "topk",
        "k": found.k,
        "temperatures": [1.0],
        **facts_of(source, "unknown"),
        "unknown": unknown,
        "captured": {"form": rows.reader.form, "align": align, "by": "others, and read by distill.ingest"},
    }
    dropped = f"; dropped {found.dropped:,} without a token to train on" if found.dropped else ""
    logger.info(
        "data: %s examples of %s, read as %s, row t about token %s; unknown: %s%s",
        f"{len(samples.lengths) + found.dropped:,}", name, rows.reader.form, "t" if align == "token" else "t+1",
        ", ".join(unknown), dropped,
    )  # fmt: skip
    return create_store(
        config.store, facts, fingerprint, samples, *place_samples(samples, config.seed, config.store.block_rows)
    )


class Worker:
    """Does the blocks that are dealt to it."""

    def __init__(self, job: Job, board: Board, watch: Watch) -> None:
        self._job, self._store, self._board, self._watch = job, job.store, board, watch
        self.totals = Totals()
        self._began = time.monotonic()
        there = job.store.num_blocks - len(job.missing)
        logger.info("%d of %d blocks are there", there, job.store.num_blocks)

    def work(self, dealt: list[int]) -> None:
        """Read all rows, keep those of these blocks, and write block after block."""
        self._began = time.monotonic()
        if dealt:
            with tempfile.TemporaryFile() as file:
                self._write(dealt, self._gathered(dealt, file))
        self.totals.seconds = time.monotonic() - self._began

    def progress(self) -> tuple[int, str]:
        """For the progress bar: the tokens that all workers have written in this run."""
        return self._board.add("tokens", 0), ""

    def _gathered(self, dealt: list[int], file: IO[bytes]) -> NDArray[Any]:
        """[N]: the rows of these blocks, one block after the other, in a file that is mapped."""
        store, k = self._store, int(self._store.attributes["k"])
        kept = np.dtype([("ids", "<i4", k), ("logprobs", "<f2", k), ("tail", "<f2"), ("following", "<f2")])
        where: dict[int, tuple[int, int]] = {}
        size = 0
        for block in dealt:
            samples = store.samples_of(block)
            columns = (store.read_rows(name, samples.start, samples.stop) for name in ("sample_index", "sample_length"))
            for example, length in zip(*(column.tolist() for column in columns), strict=True):
                where[example] = size, length
                size += length
        gathered: NDArray[Any] = np.memmap(file, kept, "w+", shape=(size,))
        tail_is_known, following_is_known = (name not in store.unknown for name in ("tail_logprob", "next_logprob"))
        for number, row in enumerate(self._job.rows):
            self._watch.beat()
            if number not in where:
                continue
            start, length = where.pop(number)
            example = self._job.rows.reader.read(row, number, self._job.align)
            if example is None or len(example.tokens) != length:
                raise DataError(f"dataset.path: example {number} of {self._job.rows.data.name} changed: run again")
            rows = gathered[start : start + length]
            wide = example.ids.shape[1]
            rows["ids"], rows["logprobs"], rows["tail"], rows["following"] = -1, np.nan, np.nan, np.nan
            rows["ids"][:, :wide] = example.ids[:, :k]
            rows["logprobs"][:, :wide] = round_logprobs(example.logprobs[:, :k].astype(np.float32))
            if following_is_known:
                rows["following"] = as_float16(example.following.astype(np.float32))
            if tail_is_known:
                rows["tail"] = round_logprobs(example.tail().astype(np.float32))
            if not where:
                break
        if where:
            raise DataError(f"dataset.path: {self._job.rows.data.name} has fewer examples than before: run again")
        return gathered

    def _write(self, dealt: list[int], gathered: NDArray[Any]) -> None:
        sizes, at = self._store.tokens_per_block(), 0
        for block in dealt:
            size = int(sizes[block])
            rows = gathered[at : at + size]
            at += size
            nothing = np.full((size, 1), np.nan, np.float32)
            for name, values in (
                ("target_ids", rows["ids"]), ("target_logprobs", rows["logprobs"]), ("logsumexp", nothing),
                ("tail_logprob", rows["tail"][:, None]), ("next_logprob", rows["following"]),
            ):  # fmt: skip
                self._store.write_rows(name, block, values)
            self._store.commit(block, size)
            self._watch.beat()
            self.totals.tokens += size
            self._board.add("tokens", size)
            logger.info("block %d is committed: %d rows", block, size, extra={"console": False})


def summary(store: WritableStore, config: IngestConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: what the store holds, what it does not, and the next command to type."""
    found = store.attributes
    size = sum(store.describe(name)[2] or 0 for name in store.array_names())
    lines = {
        "samples": f"{found['num_samples']:,}",
        "tokens": f"{found['num_tokens']:,}",
        "ids": f"{found['k']} a row at most",
        "unknown": ", ".join(found["unknown"]),
        "size": f"{human(size)}, {size / found['num_tokens']:.0f} bytes/token",
    }
    if totals is not None and totals.tokens:
        lines["speed"] = f"{totals.tokens / totals.seconds:,.0f} tokens/s"
    lines |= {"store": store.path, "logs": config.log_dir, "next": f"python -m distill.inspect {store.path}"}
    return "\n" + table(lines)
