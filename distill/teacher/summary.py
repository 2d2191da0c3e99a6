"""A store in words: how large it is, what it keeps, how fast it came."""

import math

import numpy as np

from distill.config import GenerateConfig
from distill.store.store import Store
from distill.teacher.worker import Totals

_MOST_READ_BLOCKS = 512


def summary(store: Store, config: GenerateConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: what the store holds, how fast it came, and the next command to type.

    totals: of the work of this run, if it did any.
    """
    found = store.attributes
    size = sum(store.describe(name)[2] for name in store.array_names())
    lines = {
        "samples": f"{found['num_samples']:,}",
        "tokens": f"{found['num_tokens']:,}",
        "size": f"{human(size)}, {size / found['num_tokens']:.0f} bytes/token",
        f"top-{found['k']} mass": f"{mean_kept_mass(store):.4f} on average",
    }
    if totals is not None and totals.tokens:
        part = "" if totals.tokens == found["num_tokens"] else f" (of the {totals.tokens:,} tokens of this run)"
        lines["speed"] = f"{totals.tokens / totals.seconds:,.0f} tokens/s"
        if totals.targets:
            lines["teacher perplexity"] = f"{math.exp(totals.nll / totals.targets):.2f}{part}"
    lines |= {
        "store": store.path,
        "logs": config.log_dir,
        "next": f"python -m distill.inspect {store.path}",
    }
    return "\n" + table(lines)


def expected_bytes(tokens: int, k: int, vocab_size: int, num_temperatures: int) -> float:
    """About the size of a store that is yet to be made, from what compressed arrays have measured so far."""
    return tokens * (k * (0.9 * math.log2(vocab_size) / 8 + 0.6) + 5 * num_temperatures + 2)


def mean_kept_mass(store: Store) -> float:
    """The mean probability of the kept ids, over the tokens of committed blocks; nan where there are none.

    Of very many blocks, some hundreds at even distances are read.
    """
    column = store.attributes["temperatures"].index(1.0)
    mass = rows = 0.0
    there = np.flatnonzero(store.committed())
    for block in there[:: -(-len(there) // _MOST_READ_BLOCKS) or 1]:
        start = int(block) * store.block_rows
        tail = store.read_rows("tail_logprob", start, start + store.block_rows)[:, column].astype(np.float32)
        tail = tail[~np.isnan(tail)]
        mass += float((-np.expm1(np.minimum(tail, 0))).sum())
        rows += len(tail)
    return mass / rows if rows else math.nan


def table(lines: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def human(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
