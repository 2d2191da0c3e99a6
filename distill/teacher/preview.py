"""What a run would do, before it does it: the plan, and if asked what the teacher says of a few batches.

N rows of a batch, K kept ids.
"""

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config.generate import CaptureConfig, GenerateConfig
from distill.data import plan
from distill.data.dataset import find as find_data
from distill.data.show import marked
from distill.run.device import count_devices, free_bytes, pick_device
from distill.run.grid import Grid
from distill.teacher.choice import Choice, expected_bytes
from distill.teacher.loading import load_here
from distill.teacher.model import Teacher
from distill.teacher.placement import Needs, arithmetic
from distill.teacher.prepare import check_settings, find, lay_out, place
from distill.teacher.source import Source
from distill.teacher.summary import human, table

_MEASURED_TOKENS = 4096
_MEASURED_K = 64


def preview(config: GenerateConfig, grid: Grid, arguments: Sequence[str], measure: bool = False) -> str:
    """What --plan prints, for a run with these command-line `arguments`. Raises UserError as a run would.

    Without torchrun: for the workers that this machine would take, one for each GPU, or for each core.
    measure: load the teacher, and say what it would keep of a few batches.
    """
    device = pick_device("teacher.device", config.teacher.device, 0, 1)
    if not grid.launched:
        each = config.parallel.shard_size if config.parallel.mode == "device_map" else 1
        devices = count_devices(config.teacher.device, device, len(os.sched_getaffinity(0)))
        workers = max(1, devices // each) if isinstance(each, int) else 1
        grid = Grid(world_size=workers, local_world_size=workers)
    source, needs = find(config, device)
    check_settings(config, source)
    free = free_bytes(device, grid.local_world_size)
    placement = place(config, grid, needs, free, device)
    samples, order, layout = lay_out(config, source, find_data(config.dataset))
    first = samples.take(np.array([0]))
    tokens = int(layout.lengths.sum(dtype=np.int64))
    fewest, rest = divmod(layout.num_blocks, grid.sharded(placement.workers).num_replicas)
    share = f"{fewest} or {fewest + 1}" if rest else fewest
    shown = marked(source.tokenizer, first["tokens"], first.get("loss_mask"))
    command = ["torchrun", f"--nproc_per_node={grid.local_world_size}", "-m", "distill.generate", *arguments]
    capture, found = config.capture, None
    ids, about = float(capture.k), "at most" if capture.method == "sample" else "about"
    if measure:
        found = _measured(config, source, needs, device, [samples.take(np.array([i])) for i in order[:256]])
        ids, about = found.expected_ids(capture.method, capture.k), "about"
    size = expected_bytes(capture.method, ids, needs.vocab_size, len(capture.temperatures), config.store.codec)
    lines = {
        "teacher": f"{config.teacher.model} ({needs.architecture}, {needs.dtype_name}) on {device.type}",
        "memory": arithmetic(needs, free, placement),
        "parallel": placement.describe(grid),
        "samples": f"{len(layout.lengths):,}",
        "tokens": f"{tokens:,}",
        "blocks": f"{layout.num_blocks:,} of {layout.block_rows:,} rows, {share} a replica",
        "store": f"{about} {human(tokens * size)}, {size:.0f} bytes/token",
        "next": shlex.join(command),
    }
    if found is not None:
        lines |= {"measured": f"{found.rows:,} tokens", **found.lines(needs.vocab_size, config.store.codec)}
    return f"{table(lines)}\n\nthe first sample, «what is trained on»:\n{shown}"


def _measured(
    config: GenerateConfig,
    source: Source,
    needs: Needs,
    device: torch.device,
    samples: Sequence[Mapping[str, NDArray[Any]]],
) -> Choice:
    """What the teacher says of some of the samples, a few thousand tokens, on this machine's device or devices."""
    lengths = np.array([len(sample["tokens"]) for sample in samples], np.int32)
    lengths = lengths[: max(1, int(np.searchsorted(lengths.cumsum(), _MEASURED_TOKENS, "right")))]
    k = min(source.vocab_size, max(config.capture.k, _MEASURED_K))
    found, settings = Choice(k, more=config.capture.k), CaptureConfig("topk", k)
    with tempfile.TemporaryDirectory() as offload:
        model, share = load_here(source, needs, device, Path(offload))
        teacher = Teacher(model, device, share, int(lengths.max()), config.batch.max_tokens)
        for batch in plan.batches(lengths, config.batch.max_tokens, teacher.rope_switch):
            tokens = [samples[i]["tokens"] for i in batch]
            captured = teacher.capture(tokens, settings, np.zeros(int(lengths[batch].sum())))
            assert captured is not None
            tail = captured.tail_logprob[:, 0].numpy()
            kept = captured.target_ids.numpy(), captured.target_logprobs.numpy()
            following = captured.next_logprob.numpy()
            if "loss_mask" in samples[0]:
                following = np.where(np.concatenate([samples[i]["loss_mask"] for i in batch]), following, np.nan)
            found.add(*kept, tail, following)
    return found
