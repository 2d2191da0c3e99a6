"""Stores of small teachers, their exports, and losses as other trainers compute them: from the columns alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from distill.config.exchange import ExportConfig, IngestConfig
from distill.exchange import exporting, ingesting
from distill.run.board import Board
from distill.run.grid import Grid
from distill.run.watch import Watch
from distill.settings import load, named
from tests.support import generate_here

CHATS = [
    {"messages": [{"role": "user", "content": "ab" * (1 + i)}, {"role": "assistant", "content": "cde" * (2 + i % 3)}]}
    for i in range(9)
]
TEXTS = [{"text": "abc de " * (2 + i)} for i in range(9)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captured(folder: Path, teacher: Path, rows: Sequence[Any], *arguments: str) -> Path:
    """The store of a teacher over these rows, in blocks of 128 rows."""
    folder.mkdir(exist_ok=True)
    data = write(folder / "rows.jsonl", rows)
    settings = [f"teacher.model={teacher}", f"dataset.path={data}", f"store.path={folder / 'store.zarr'}"]
    return generate_here(folder, *settings, "store.block_rows=128", *arguments)


def export_here(store: Path | str, out: Path, *arguments: str) -> Path:
    """What distill.export does, by one worker, in this process."""
    alone = [str(store), str(out), f"log_dir={out.parent}", *arguments]
    config = load(ExportConfig, named(ExportConfig, alone, "store.path", "output"))
    board = Board(torch.distributed.HashStore())
    job = exporting.plan_job(config, Grid(), board)
    if job is not None:
        exporting.Worker(config, job, board, Watch(board, Grid(), 600.0, lambda error: None)).work(job.missing)
    return out


def ingest_here(rows: Path | str, store: Path, teacher: Path, *arguments: str) -> Path:
    """What distill.ingest does, by one worker, in this process."""
    alone = [str(rows), str(store), f"teacher.model={teacher}", f"log_dir={store.parent}", *arguments]
    config = load(IngestConfig, named(IngestConfig, alone, "dataset.path", "store.path"))
    board = Board(torch.distributed.HashStore())
    job = ingesting.plan_job(config, Grid(), board, ingesting.find(config))
    if job is not None:
        ingesting.Worker(job, board, Watch(board, Grid(), 600.0, lambda error: None)).work(job.missing)
        job.store.mark_complete()
        job.store.unlock()
    return store


def table(folder: Path, tmp_path: Path) -> Any:
    """An export as the library `datasets` reads it."""
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def kl_of_columns(logits: Tensor, row: Any, align: str, renormalize: bool = True) -> Tensor:
    """The sum of forward KL over the rows of one sample, in float64, with nothing but its columns and [T, V] logits.

    As axolotl does: current versions take row t of the targets beside logits t; those that shift inside take rows 1 to
    T-1 beside logits 0 to T-2.
    """
    ids, logprobs = torch.tensor(row["target_token_ids"]), torch.tensor(row["target_logprobs"]).double()
    mask = torch.tensor(row["target_mask"]).bool()
    q = logits.double().log_softmax(dim=1)
    if align == "token":
        ids, logprobs, mask, q = ids[1:], logprobs[1:], mask[1:], q[:-1]
    if renormalize:
        logprobs = logprobs.masked_fill(~mask, -torch.inf).log_softmax(dim=1)
    q = q.gather(1, ids)
    return (logprobs[mask].exp() * (logprobs[mask] - q[mask])).sum()
