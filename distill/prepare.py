"""What worker 0 does before the teacher runs: recognise the store, or tokenize, plan and create it."""

import importlib.metadata
import logging
import platform
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import __version__, data, plan, schema
from distill.config import GenerateConfig
from distill.errors import ConfigError, StoreError, TeacherError
from distill.fingerprint import differences, summarize
from distill.store import Store, check_writable
from distill.teacher import Source

logger = logging.getLogger(__name__)

_RECORDED_PACKAGES = ("torch", "transformers", "zarr", "numcodecs", "datasets")


def fingerprint_of(config: GenerateConfig, source: Source, dtype: str) -> dict[str, Any]:
    """The settings and contents that determine the store's bytes, as a flat mapping."""
    settings: dict[str, Any] = {
        "teacher.dtype": dtype,
        "teacher.attn_implementation": config.teacher.attn_implementation,
        **source.fingerprint,
        **data.identity(config.dataset, ours=[config.store.path, config.log_dir]),
        "batch.max_tokens": config.batch.max_tokens,
        "store.block_rows": config.store.block_rows,
        "store.codec": config.store.codec,
    }
    for section, left_out in (("dataset", {"path", "data_files", "num_proc"}), ("capture", set())):
        values = vars(getattr(config, section))
        settings |= {f"{section}.{key}": value for key, value in values.items() if key not in left_out}
    return settings


def check_settings(config: GenerateConfig, source: Source) -> None:
    """Raise ConfigError for settings that this teacher cannot serve."""
    if config.capture.k > source.vocab_size:
        raise ConfigError(
            f"capture.k: expected at most {source.vocab_size}, the teacher's vocabulary, found {config.capture.k}"
        )
    length, context = config.dataset.max_length, source.context_length
    if length is not None and context is not None and length > context:
        raise ConfigError(f"dataset.max_length: expected at most {context}, the teacher's context, found {length}")


def find_store(config: GenerateConfig, fingerprint: dict[str, Any]) -> Store | None:
    """The store of this very run, locked, if it was begun before.

    Raises StoreError where the path holds something else, another run's store (naming each key that differs), or one
    that another run is writing, or where it cannot be written.
    """
    store = Store.open(config.store.path, config.store.options, writable=True)
    check_writable(config.store.path)
    if store is None:
        return None
    if differing := differences(store.attributes["config"], fingerprint, "the store"):
        state = "a complete" if store.complete else "an unfinished"
        raise StoreError(
            f"store.path: {config.store.path} is {state} store of another run; choose another path, or delete it:\n  "
            + "\n  ".join(differing)
        )
    if store.complete and not store.published:
        raise StoreError(f"store.path: {config.store.path} was complete and now lacks its commits: a damaged copy?")
    if not store.published:
        return None
    if not store.complete:
        store.lock()
    return store


def lay_out(config: GenerateConfig, source: Source) -> tuple[data.Samples, NDArray[np.int64], plan.Plan]:
    """Tokenize the dataset and place the samples: the samples, the order in which they lie, and where."""
    samples = data.tokenize(config.dataset, source.tokenizer, source.context_length)
    if samples.largest_token >= source.vocab_size:
        raise TeacherError(
            f"teacher.model: expected token ids below {source.vocab_size}, the model's vocabulary, found "
            f"{samples.largest_token} from its tokenizer of {len(source.tokenizer)}: the model was not resized for it"
        )
    order = plan.permutation(len(samples.lengths), config.capture.seed)
    lengths = samples.lengths[order]
    rows = config.store.block_rows
    return samples, order, plan.lay_out(lengths, rows if isinstance(rows, int) else plan.auto_block_rows(lengths))


def plan_store(config: GenerateConfig, source: Source, fingerprint: dict[str, Any], dtype: str) -> Store:
    """Tokenize the dataset, place the samples, and create the store with its tokens."""
    samples, order, layout = lay_out(config, source)
    lengths = layout.lengths
    store = Store.create(
        config.store.path,
        config.store.options,
        attributes={
            "complete": False,
            "method": config.capture.method,
            "k": config.capture.k,
            "draws": 0,
            "temperatures": list(config.capture.temperatures),
            "vocab_size": source.vocab_size,
            "block_rows": layout.block_rows,
            "num_samples": len(lengths),
            "num_tokens": int(lengths.sum(dtype=np.int64)),
            "fingerprint": summarize(fingerprint),
            "config": fingerprint,
            "teacher": {
                "model": config.teacher.model,
                "revision": config.teacher.revision,
                "architecture": (source.model_config.architectures or ["unknown"])[0],
                "dtype": dtype,
            },
            "tokenizer": source.vocabulary,
            "versions": {
                "distill": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
            },
        },
        specs=schema.array_specs(config.capture.k, len(config.capture.temperatures), samples.has_loss_mask),
        sizes={"row": layout.num_rows, "sample": len(lengths), "block": layout.num_blocks},
        inner_rows=min(plan.INNER_ROWS, layout.block_rows),
        codec=config.store.codec,
    )
    store.write_all("sample_start", layout.starts)
    store.write_all("sample_length", layout.lengths)
    sample_index = np.empty(len(lengths), np.int64)
    for block in range(layout.num_blocks):
        placed = layout.samples_of(block)
        found = samples.take(order[placed.start : placed.stop])
        sample_index[placed.start : placed.stop] = found["source"]
        for name in ("tokens", "loss_mask"):
            if name in found:
                store.write_rows(name, block, found[name])
    store.write_all("sample_index", sample_index)
    store.publish(layout.num_blocks)
    logger.info(
        "plan: %s samples, %s tokens in %d blocks of %d rows",
        f"{len(lengths):,}", f"{lengths.sum(dtype=np.int64):,}", layout.num_blocks, layout.block_rows,
    )  # fmt: skip
    return store
