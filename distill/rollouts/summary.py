"""Rollouts in words: how many, how long, how probable, how fast they came."""

import math

import numpy as np
import pyarrow.parquet

from distill.config.rollout import RolloutConfig
from distill.rollouts.parts import Parts
from distill.teacher.summary import table
from distill.teacher.worker import Totals


def summary(parts: Parts, config: RolloutConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: how many rollouts there are, how long and how probable, and the next command.

    totals: of the work of this run, if it did any.
    """
    assert parts.manifest is not None
    rollouts = finished = tokens = 0
    logprob = 0.0
    for part in range(parts.manifest["parts"]):
        found = pyarrow.parquet.read_table(parts.file(part), columns=["logprobs", "finished"])
        each = found["logprobs"].combine_chunks().flatten().to_numpy()
        rollouts, tokens = rollouts + len(found), tokens + len(each)
        logprob += float(each.sum(dtype=np.float64))
        finished += int(found["finished"].combine_chunks().true_count)
    lines = {
        "prompts": f"{parts.manifest['prompts']:,}",
        "rollouts": f"{rollouts:,}, {finished / rollouts:.1%} of them finished",
        "tokens": f"{tokens:,}, {tokens / rollouts:,.0f} a rollout on average",
        "perplexity": f"{math.exp(-logprob / tokens):.2f}, of what they were drawn from",
    }
    if totals is not None and totals.tokens:
        lines["speed"] = f"{totals.tokens / totals.seconds:,.0f} tokens/s"
    store = f"{str(parts.folder).rstrip('/')}.zarr"
    lines |= {
        "folder": str(parts.folder),
        "logs": config.log_dir,
        "next": f"python -m distill.generate teacher.model=TEACHER dataset.path={parts.folder} store.path={store}",
    }
    return "\n" + table(lines)
