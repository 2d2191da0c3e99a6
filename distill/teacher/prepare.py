"""What worker 0 does before the teacher runs: find the store, or plan and create it, and tell the other workers."""

import base64
import importlib.metadata
import json
import logging
import platform
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distill import __version__
from distill.config.generate import GenerateConfig, StoreConfig
from distill.data import plan
from distill.data.dataset import Data
from distill.data.dataset import find as find_data
from distill.data.tokenize import Samples, tokenize
from distill.errors import ConfigError, StoreError, TeacherError
from distill.run.board import Board
from distill.run.device import count_devices
from distill.run.grid import Grid
from distill.settings import to_yaml
from distill.store.fingerprint import differences, summarize
from distill.store.location import check_writable
from distill.store.writable import WritableStore
from distill.teacher.check import rope_switch
from distill.teacher.model import resolve_dtype, slice_bytes
from distill.teacher.placement import Needs, Placement, arithmetic, decide
from distill.teacher.source import Source, locate
from distill.teacher.summary import summary

logger = logging.getLogger(__name__)

_RECORDED_PACKAGES = ("torch", "transformers", "zarr", "numcodecs", "datasets")


class Job(NamedTuple):
    """What there is to do, the same for all workers.

    placement:   how the teacher is placed
    missing:     the blocks that are not committed yet
    done_tokens: of the committed ones
    longest:     the tokens of the longest sample
    """

    placement: Placement
    store: WritableStore
    missing: list[int]
    done_tokens: int
    longest: int

    @classmethod
    def of(cls, placement: Placement, store: WritableStore) -> "Job":
        """What a store lacks. Worker 0 reads it for all: one that read it later would find less missing."""
        missing = store.missing_blocks()
        done = np.delete(store.tokens_per_block(), missing)
        longest = max(int(lengths.max()) for lengths in store.read_chunks("sample_length"))
        return cls(placement, store, missing, int(done.sum()), longest)

    def note(self) -> str:
        """All but the store, as text. The missing blocks are bits: torchrun's store takes 8 MiB, which numbers fill."""
        there = np.ones(self.store.num_blocks, bool)
        there[self.missing] = False
        bits = base64.b85encode(zlib.compress(np.packbits(there).tobytes(), 1)).decode()
        return json.dumps([astuple(self.placement), bits, self.done_tokens, self.longest])

    @classmethod
    def of_note(cls, note: str, store: WritableStore) -> "Job":
        """The job that worker 0 has noted."""
        placement, bits, done_tokens, longest = json.loads(note)
        packed = np.frombuffer(zlib.decompress(base64.b85decode(bits)), np.uint8)
        there = np.unpackbits(packed, count=store.num_blocks).astype(bool)
        return cls(Placement(*placement), store, np.flatnonzero(~there).tolist(), done_tokens, longest)


def find(config: GenerateConfig, device: torch.device) -> tuple[Source, Needs]:
    """The teacher's files, and what the teacher needs of a device like this one."""
    source = locate(config.teacher)
    return source, Needs.of(source, resolve_dtype(source, device), config.batch.max_tokens, slice_bytes(device))


def plan_job(
    config: GenerateConfig, grid: Grid, board: Board, source: Source, needs: Needs, device: torch.device
) -> Job | None:
    """Worker 0 places the teacher, finds or makes the store, and tells the others. None: the store is complete.

    Raises UserError, also where this worker does not see the store that worker 0 has made.
    """
    if grid.rank > 0:
        if not (note := board.wait("job")):
            return None
        return Job.of_note(note, store_of_worker_0(config.store, grid.rank))
    check_settings(config, source)
    free = min(int(board.wait(f"free memory of {rank}")) for rank in range(grid.world_size))
    placement = place(config, grid, needs, free, device)
    data = find_data(config.dataset)
    fingerprint = fingerprint_of(config, source, needs, data)
    store = find_store(config.store, fingerprint)
    if store is not None and not store.complete and not store.plan_is_whole:
        logger.warning("%s lacks parts of its plan: they are written again from the dataset", config.store.path)
        replan(store, *lay_out(config, source, data))
    if store is not None and store.complete:
        board.note("job", "")
        logger.info("%s is complete already: nothing to do", config.store.path)
        logger.info(summary(store, config))
        return None
    logger.info("teacher: %s, %s, on %s", config.teacher.model, needs.dtype_name, device)
    logger.info("parallel: %s; %s", placement.describe(grid), arithmetic(needs, free, placement))
    (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
    store = store or plan_store(config, source, needs, data, fingerprint)
    job = Job.of(placement, store)
    board.note("job", job.note())
    return job


def place(config: GenerateConfig, grid: Grid, needs: Needs, free: int, device: torch.device) -> Placement:
    """How replicas of the teacher are spread, where `free` bytes are free on each device."""
    devices = count_devices(config.teacher.device, device, grid.local_world_size)
    return decide(config.parallel, needs, free, grid, devices)


def fingerprint_of(config: GenerateConfig, source: Source, needs: Needs, data: Data) -> dict[str, Any]:
    """The settings and the contents of files that determine the store's bytes, as a flat mapping."""
    settings: dict[str, Any] = {
        "teacher.dtype": needs.dtype_name,
        "teacher.attn_implementation": config.teacher.attn_implementation,
        **source.fingerprint,
        **data.identity,
        "batch.max_tokens": config.batch.max_tokens,
        "store.block_rows": config.store.block_rows,
        "store.codec": config.store.codec,
    }
    switch, longest = rope_switch(source.text_config), config.dataset.max_length
    if switch is not None and (not isinstance(longest, int) or longest > switch):
        settings["batch.rope_switch"] = switch  # it shapes batches
    outside = {"path", "data_files", "num_proc", "chat_template"}  # their contents are in data.identity
    for section, left_out in (("dataset", outside), ("capture", set())):
        values = vars(getattr(config, section))
        settings |= {f"{section}.{key}": value for key, value in values.items() if key not in left_out}
    return settings


def check_settings(config: GenerateConfig, source: Source) -> None:
    """Raise ConfigError where the settings want more than this teacher has: ids, or context."""
    if config.capture.k > source.vocab_size:
        raise ConfigError(
            f"capture.k: expected at most {source.vocab_size}, the teacher's vocabulary, found {config.capture.k}"
        )
    length, context = config.dataset.max_length, source.context_length
    if isinstance(length, int) and context is not None and length > context:
        raise ConfigError(f"dataset.max_length: expected at most {context}, the teacher's context, found {length}")


def store_of_worker_0(config: StoreConfig, rank: int) -> WritableStore:
    """The store that worker 0 has made or found, opened by worker `rank`. Raises StoreError where it is not seen."""
    store = WritableStore.open(config.path, config.options, known=True)
    if store is None or not store.published:
        raise StoreError(f"store.path: worker 0 created {config.path}, worker {rank} does not see it")
    return store


def find_store(config: StoreConfig, fingerprint: dict[str, Any]) -> WritableStore | None:
    """The store of this very run, locked, if an earlier start has created it.

    A complete store that lacks something, as after an incomplete copy or a repair, is not complete any more.
    Raises StoreError where the path holds something else or another run's store (naming each key that differs), where
    another run is writing there, and where the path cannot be written.
    """
    store = WritableStore.open(config.path, config.options)
    check_writable(config.path)
    if store is None:
        return None
    if differing := differences(store.attributes["config"], fingerprint, "the store"):
        state = "a complete" if store.complete else "an unfinished"
        raise StoreError(
            f"store.path: {config.path} is {state} store of another run; choose another path, or delete it:\n  "
            + "\n  ".join(differing)
        )
    if not store.published:
        return None
    lacking = store.lacking_blocks()
    lost = len(lacking) + (len(store.missing_blocks()) if store.complete else 0)
    if store.complete and not lost and store.plan_is_whole:
        return store
    store.lock()
    store.reopen()
    for block in lacking:
        store.take_back(block)
    if lost:
        logger.warning("%s lacks %d blocks that it had: they are made again", config.path, lost)
    return store


def lay_out(config: GenerateConfig, source: Source, data: Data) -> tuple[Samples, NDArray[np.integer], plan.Plan]:
    """Tokenize the dataset and place the samples: returns the samples, the order in which they lie, and where.

    Raises DataError as `tokenize` does, TeacherError where the tokenizer has ids that the model lacks.
    """
    samples = tokenize(data, source.tokenizer, source.context_length, source.vocab_size)
    if samples.largest_token >= source.vocab_size:
        raise TeacherError(
            f"teacher.model: expected token ids below {source.vocab_size}, the model's vocabulary, found "
            f"{samples.largest_token} from its tokenizer of {len(source.tokenizer)}: the model was not resized for it"
        )
    if data.written not in (None, source.vocabulary):
        logger.warning(
            "%s was written with another tokenizer than the teacher's, which may mean other words by the same ids",
            data.name,
        )
    return samples, *place_samples(samples, config.capture.seed, config.store.block_rows)


def place_samples(samples: Samples, seed: int, block_rows: int | str) -> tuple[NDArray[np.integer], plan.Plan]:
    """The order in which samples lie in a store, and where. block_rows: as store.block_rows."""
    order = plan.permutation(len(samples.lengths), seed)
    lengths = samples.lengths[order]
    rows = block_rows if isinstance(block_rows, int) else plan.auto_block_rows(lengths)
    return order, plan.lay_out(lengths, rows)


def plan_store(
    config: GenerateConfig, source: Source, needs: Needs, data: Data, fingerprint: dict[str, Any]
) -> WritableStore:
    """Tokenize the dataset, place the samples, and create the store with its tokens."""
    samples, order, layout = lay_out(config, source, data)
    facts = {
        "method": config.capture.method,
        "k": config.capture.k,
        "temperatures": list(config.capture.temperatures),
        **facts_of(source, needs.dtype_name),
    }
    return create_store(config.store, facts, fingerprint, samples, order, layout)


def facts_of(source: Source, dtype: str) -> dict[str, Any]:
    """What the attributes of a store say of its teacher."""
    return {
        "vocab_size": source.vocab_size,
        "teacher": {
            "model": source.config.model,
            "revision": source.config.revision,
            "architecture": (source.model_config.architectures or ["unknown"])[0],
            "dtype": dtype,
        },
        "tokenizer": source.vocabulary,
    }


def create_store(
    config: StoreConfig, facts: dict[str, Any], fingerprint: dict[str, Any], samples: Samples, order: NDArray[Any],
    layout: plan.Plan,
) -> WritableStore:  # fmt: skip
    """Create a store with the tokens of these samples. facts: what its attributes say beside the layout."""
    num_tokens = int(layout.lengths.sum(dtype=np.int64))
    versions = {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES}
    store = WritableStore.create(
        config.path,
        config.options,
        attributes={
            **facts,
            "block_rows": layout.block_rows,
            "num_blocks": layout.num_blocks,
            "num_samples": len(layout.lengths),
            "num_tokens": num_tokens,
            "fingerprint": summarize(fingerprint),
            "config": fingerprint,
            "versions": {"distill": __version__, "python": platform.python_version(), **versions},
        },
        planned=samples.columns,
        codec=config.codec,
    )
    table, blocks = _contents(samples, order, layout)
    for name, values in table.items():
        store.write_all(name, values)
    for block, arrays in enumerate(blocks()):
        for name, values in arrays.items():
            store.write_rows(name, block, values)
    store.publish()
    logger.info(
        "plan: %s samples, %s tokens in %d blocks of %d rows",
        f"{len(layout.lengths):,}", f"{num_tokens:,}", layout.num_blocks, layout.block_rows,
    )  # fmt: skip
    return store


def replan(store: WritableStore, samples: Samples, order: NDArray[Any], layout: plan.Plan) -> None:
    """Write what is missing of a store's plan, as `WritableStore.rewrite_plan` does."""
    if (layout.num_blocks, len(layout.lengths)) != (store.num_blocks, store.num_samples):
        raise StoreError(
            f"{store.path}: a part of its plan is missing, and cannot be written again: expected "
            f"{store.num_samples:,} samples in {store.num_blocks} blocks, found {len(layout.lengths):,} in "
            f"{layout.num_blocks} in the dataset"
        )
    store.rewrite_plan(*_contents(samples, order, layout))


def _contents(
    samples: Samples, order: NDArray[Any], layout: plan.Plan
) -> tuple[dict[str, NDArray[Any]], Callable[[], Iterator[dict[str, NDArray[Any]]]]]:
    """What the plan writes: the arrays over samples, and the planned ones over rows, block by block."""

    def blocks() -> Iterator[dict[str, NDArray[Any]]]:
        for block in range(layout.num_blocks):
            placed = layout.samples_of(block)
            found = samples.take(order[placed.start : placed.stop])
            yield {name: values for name, values in found.items() if name != "source"}

    table: dict[str, NDArray[Any]] = {
        "sample_start": layout.starts,
        "sample_length": layout.lengths,
        "sample_index": samples.source[order],
    }
    return table, blocks
