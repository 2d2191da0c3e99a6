"""How much of the teacher's own speed is left: distill.generate beside the bare forward and a hand-written loop.

    python -m tests.benchmarks.generate [rounds=5] [key=value ...]        # keys as for distill.generate

Over the same samples, in one process: distill in turn with topk, with the bare forward, then with the loop, `rounds`
times each; medians of the ratios within a round.

bare      backbone and head over the same tokens, perfectly batched: full rows, no padding; nothing is kept
distill   what distill.generate does once the teacher is loaded: read tokens, batch, forward, capture, compress, commit
topk      the same with capture.method=topk capture.k=64
loop      what is written today: padded batches of 8 in data order, model(...).logits, log_softmax, topk, HDF5 with gzip

On a GPU: python -m tests.benchmarks.generate rounds=5 teacher.device=cuda teacher.model=FOLDER dataset.path=texts.jsonl
"""

import copy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import transformers

from distill.config.generate import GenerateConfig
from distill.data.dataset import find
from distill.data.plan import Plan
from distill.run.board import Board, store_of
from distill.run.device import pick_device
from distill.run.grid import Grid
from distill.run.watch import Watch
from distill.settings import load
from distill.store.store import Store
from distill.store.writable import WritableStore
from distill.teacher import prepare
from distill.teacher.model import Teacher, resolve_dtype, slice_bytes
from distill.teacher.placement import Needs
from distill.teacher.source import locate
from distill.teacher.worker import Worker


def samples_of(store: Store) -> Iterator[np.ndarray[Any, Any]]:
    """The token ids of each sample, in the order of the store."""
    plan = Plan(store.block_rows, store.read_all("sample_start"), store.read_all("sample_length"))
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        yield store.read_rows("tokens", int(start), int(start + length))


def bare(model: Any, store: Store, max_tokens: int) -> None:
    """Backbone and head over the same tokens in full rows, all of one length: nothing is padded, nothing is kept.

    The length is the mean over tokens of their sample's length, so that attention has as much to do as in the samples.
    """
    samples = list(samples_of(store))
    tokens = np.concatenate(samples).astype(np.int64)
    length = sum(len(sample) ** 2 for sample in samples) // len(tokens)
    rows = torch.from_numpy(tokens[: len(tokens) // length * length]).view(-1, length)  # [rows, T]
    for ids in rows.split(max(1, max_tokens // length)):
        hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        for part in hidden.flatten(0, 1).split(1024):
            model.get_output_embeddings()(part)


def loop(model: Any, store: Store, file: Path, k: int) -> None:
    """The loop that is written today."""
    samples = list(samples_of(store))
    with h5py.File(file, "w") as out:
        for first in range(0, len(samples), 8):
            batch = samples[first : first + 8]
            longest = max(map(len, batch))
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(batch):
                ids[row, : len(sample)] = torch.from_numpy(sample.astype(np.int64))
                mask[row, : len(sample)] = 1
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            logprobs, kept = torch.log_softmax(logits.float(), dim=-1).topk(k, dim=-1)
            out.create_dataset(f"{first}/logprobs", data=logprobs.half().cpu().numpy(), compression="gzip")
            out.create_dataset(f"{first}/ids", data=kept.int().cpu().numpy(), compression="gzip")


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long `run` takes."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments: list[str]) -> None:
    """Run each pair in turn, print each round, then the medians."""
    rounds = int(next((argument.split("=")[1] for argument in arguments if argument.startswith("rounds=")), "5"))
    config = load(GenerateConfig, [argument for argument in arguments if not argument.startswith("rounds=")])
    torch.set_num_threads(1)
    source, device = locate(config.teacher), pick_device("teacher.device", config.teacher.device, 0, 1)
    dtype = resolve_dtype(source, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).eval().to(device)
    teacher = Teacher(copy.deepcopy(model), device)
    scratch = Path(tempfile.mkdtemp())
    needs = Needs.of(source, dtype, config.batch.max_tokens, slice_bytes(device))
    topk = replace(config, capture=replace(config.capture, method="topk", k=64))
    plans = {}
    for name, each in (("planned.zarr", config), ("topk.zarr", topk)):
        at_scratch = replace(each, store=replace(config.store, path=str(scratch / name)))
        plans[name] = prepare.plan_store(at_scratch, source, needs, find(config.dataset), {})
    planned = plans["planned.zarr"]
    num_tokens = planned.attributes["num_tokens"]
    print(f"{num_tokens:,} tokens, {dtype} on {device}, torch {torch.__version__}, one CPU thread")

    def distill(config: GenerateConfig = config, name: str = "planned.zarr") -> None:
        shutil.rmtree(scratch / "x.zarr", ignore_errors=True)
        shutil.copytree(scratch / name, scratch / "x.zarr")
        store = WritableStore.open(str(scratch / "x.zarr"), {})
        assert store is not None
        missing = store.missing_blocks()
        board, grid = Board(store_of(Grid())), Grid()
        Worker(config, store, teacher, board, Watch(board, grid, 600, print), len(missing), missing).work()

    others: dict[str, Callable[[], None]] = {
        "topk": lambda: distill(topk, "topk.zarr"),
        "bare": lambda: bare(model, planned, 1024 if device.type == "cpu" else config.batch.max_tokens),
        "loop": lambda: loop(model, planned, scratch / "x.h5", topk.capture.k),
    }
    with torch.inference_mode():
        distill()  # warms up
        for name, other in others.items():  # apart, since the loop's gigabytes would slow what comes after it
            ratios = []
            for number in range(rounds):
                theirs, ours = seconds(other, device), seconds(distill, device)
                ratios.append(theirs / ours)
                speeds = f"{name} {num_tokens / theirs:,.0f}, distill {num_tokens / ours:,.0f} tokens/s"
                print(f"round {number + 1}: {speeds}", flush=True)
            print(f"distill is {statistics.median(ratios):.2f}x {name} (from {min(ratios):.2f} to {max(ratios):.2f})")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
