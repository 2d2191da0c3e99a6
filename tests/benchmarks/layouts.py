"""How others lay out a teacher's rows on disk, for tests.benchmarks.encoding. Written anew from what each does.

R rows, K ids, V vocabulary.

Megatron-LM   megatron/training/distillation/logits_saver.py: float16, the low 16 bits of an id and its 17th bit apart,
              torch.save, zstd level 3, tar; it has no tokens, which come from its dataset
DistillKit    arcee-ai/DistillKit, the settings that its README recommends: 16 log-probabilities as bfloat16, a
              polynomial for the others, ids of as many bits as V needs; Parquet as pyarrow writes it
others        what is written by hand: float16 and int32 arrays, or lists, with each library's usual settings
"""

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numcodecs import Zstd
from numpy.typing import NDArray

SAMPLE = 1024
"""Rows of a sample."""

_STEP = 4096  # rows of a training step of Megatron-LM
_EXACT = 16  # log-probabilities that DistillKit keeps as they are
_NOTHING = -1e4  # Megatron-LM's log-probability where there is no id

Array = NDArray[Any]
Decoded = tuple[Array, Array]
"""ids [R, K], -1 where there is none, and log weights [R, K], -inf there."""


@dataclass(frozen=True)
class Rows:
    """tokens [R] int32; ids [R, K] int32, -1 where there is none; weights [R, K] float32, their logs, -inf there."""

    tokens: Array
    ids: Array
    weights: Array
    vocab_size: int


@dataclass(frozen=True)
class Layout:
    """How to write rows into a folder, and how to read them, given K and V. sampled: rows may have fewer than K ids."""

    encode: Callable[[Path, Rows], None]
    decode: Callable[[Path, int, int], Decoded]
    sampled: bool = True


def encode_megatron(folder: Path, rows: Rows) -> None:
    """Into one tar."""
    with tarfile.open(folder / "cp0_dp0__0.tar", "w") as tar:
        for step, first in enumerate(range(0, len(rows.ids), _STEP)):
            ids = torch.from_numpy(rows.ids[first : first + _STEP])
            values = torch.from_numpy(rows.weights[first : first + _STEP]).clamp(min=_NOTHING).half()
            parts = {"values": [values], "indices_low": [(ids & 0xFFFF).to(torch.uint16)], "bit_17": [ids >> 16 != 0]}
            buffer = io.BytesIO()
            torch.save(parts, buffer)
            data = Zstd(3).encode(buffer.getvalue())
            member = tarfile.TarInfo(f"{step}.pt.zst")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def decode_megatron(folder: Path, k: int, vocab_size: int) -> Decoded:
    """Step by step."""
    ids, values = [], []
    with tarfile.open(folder / "cp0_dp0__0.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            parts = torch.load(io.BytesIO(Zstd().decode(file.read())), weights_only=True)
            values.append(parts["values"][0].float())
            low, high = parts["indices_low"][0].int(), parts["bit_17"][0].int() << 16
            ids.append(torch.where(values[-1] > _NOTHING, low | high, -1))
    weights = torch.cat(values).numpy()
    return torch.cat(ids).numpy(), np.where(weights > _NOTHING, weights, -np.inf)


def encode_distillkit(folder: Path, rows: Rows) -> None:
    """Into one Parquet file, a line for each sample."""
    k, num_bits = rows.ids.shape[1], math.ceil(math.log2(rows.vocab_size))
    parts = [torch.from_numpy(rows.weights[:, :_EXACT]).bfloat16().contiguous().view(torch.uint8).numpy()]
    if k > _EXACT:
        fit = np.linalg.pinv(_terms(k - _EXACT)) @ rows.weights[:, _EXACT:].T.astype(np.float64)
        parts.append(np.ascontiguousarray(fit.T.astype(np.float32)).view(np.uint8))
    packed = []
    for first in range(0, len(rows.ids), SAMPLE):
        big_endian = rows.ids[first : first + SAMPLE].astype(">u4")
        bits = np.unpackbits(big_endian.view(np.uint8).reshape(-1, k, 4), axis=2)[:, :, -num_bits:]
        packed.append(np.packbits(bits.reshape(-1, k * num_bits), axis=1))
    columns = {
        "input_ids": _by_sample(pa.array(rows.tokens.astype(np.uint64))),
        "compressed_logprobs": _by_sample(_by_row(np.concatenate(parts, axis=1))),
        "bytepacked_indices": _by_sample(_by_row(np.concatenate(packed))),
    }
    pq.write_table(pa.table(columns), folder / "data_0.parquet")


def decode_distillkit(folder: Path, k: int, vocab_size: int) -> Decoded:
    """All at once, but for the bits."""
    table, num_bits = pq.read_table(folder / "data_0.parquet", use_threads=False), math.ceil(math.log2(vocab_size))
    logprobs, packed = (_matrix(table[name]) for name in ("compressed_logprobs", "bytepacked_indices"))
    exact = np.ascontiguousarray(logprobs[:, : 2 * min(k, _EXACT)])
    weights = torch.from_numpy(exact).view(torch.bfloat16).float().numpy()
    if k > _EXACT:
        fit = np.ascontiguousarray(logprobs[:, 2 * _EXACT :]).view(np.float32)
        weights = np.concatenate([weights, fit @ _terms(k - _EXACT).T.astype(np.float32)], axis=1)
    places = 2.0 ** np.arange(num_bits - 1, -1, -1, dtype=np.float32)  # exact below 2**24, and a product of matrices
    ids = []
    for first in range(0, len(packed), SAMPLE):
        bits = np.unpackbits(packed[first : first + SAMPLE], axis=1, count=k * num_bits)
        ids.append((bits.reshape(-1, num_bits).astype(np.float32) @ places).reshape(-1, k).astype(np.int32))
    return np.concatenate(ids), weights


def _terms(num_values: int) -> NDArray[np.float64]:
    """Powers 0 to 4 and the square root of 0, 1, .. num_values - 1: [num_values, 6]."""
    t = np.arange(num_values, dtype=np.float64)
    return np.stack([*(t**i for i in range(5)), np.sqrt(t)], axis=1)


def _by_row(values: Array) -> pa.Array:
    """[R, N] as R lists."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def _by_sample(rows: pa.Array) -> pa.Array:
    """Rows as lists of the rows of a sample."""
    ends = [*range(0, len(rows), SAMPLE), len(rows)]
    return pa.ListArray.from_arrays(np.array(ends, np.int32), rows)


def _matrix(column: pa.ChunkedArray) -> Array:
    """The reverse of _by_sample and _by_row."""
    rows = column.combine_chunks().flatten()
    return np.asarray(rows.flatten().to_numpy(zero_copy_only=False)).reshape(len(rows), -1)


def encode_hdf5(folder: Path, rows: Rows) -> None:
    """An array for each quantity, gzip as h5py has it."""
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("tokens", data=rows.tokens, compression="gzip")
        file.create_dataset("ids", data=rows.ids, compression="gzip")
        file.create_dataset("logprobs", data=rows.weights.astype(np.float16), compression="gzip")


def decode_hdf5(folder: Path, k: int, vocab_size: int) -> Decoded:
    """All at once."""
    with h5py.File(folder / "x.h5") as file:
        file["tokens"][:]
        return file["ids"][:], file["logprobs"][:].astype(np.float32)


def encode_parquet(folder: Path, rows: Rows) -> None:
    """A line for each row with the ids that it has, zstd as pyarrow has it."""
    there = rows.ids >= 0
    offsets = np.concatenate([[0], there.sum(axis=1).cumsum()]).astype(np.int32)
    columns = {
        "token": pa.array(rows.tokens),
        "ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids[there])),
        "logprobs": pa.ListArray.from_arrays(offsets, pa.array(rows.weights[there].astype(np.float16))),
    }
    pq.write_table(pa.table(columns), folder / "x.parquet", compression="zstd")


def decode_parquet(folder: Path, k: int, vocab_size: int) -> Decoded:
    """All at once."""
    table = pq.read_table(folder / "x.parquet", use_threads=False)
    ids, logprobs = (table[name].combine_chunks() for name in ("ids", "logprobs"))
    there = np.arange(k) < np.diff(ids.offsets.to_numpy())[:, None]
    return _padded(there, ids.flatten().to_numpy(), logprobs.flatten().to_numpy(zero_copy_only=False))


def _padded(there: Array, ids: Array, logprobs: Array) -> Decoded:
    """From the values where there are any, as arrays [R, K]."""
    all_ids, weights = np.full(there.shape, -1, np.int32), np.full(there.shape, -np.inf, np.float32)
    all_ids[there], weights[there] = ids, logprobs
    return all_ids, weights


def encode_json(folder: Path, rows: Rows) -> None:
    """A line for each sample, log-probabilities with 4 decimals, only the ids that a row has."""
    counts = (rows.ids >= 0).sum(axis=1)
    with (folder / "x.jsonl").open("w") as file:
        for first in range(0, len(rows.ids), SAMPLE):
            part = slice(first, first + SAMPLE)
            lists = zip(rows.ids[part].tolist(), rows.weights[part].tolist(), counts[part], strict=True)
            ids, logprobs = [], []
            for row_ids, row_weights, count in lists:
                ids.append(row_ids[:count])
                logprobs.append([round(value, 4) for value in row_weights[:count]])
            json.dump({"tokens": rows.tokens[part].tolist(), "ids": ids, "logprobs": logprobs}, file)
            file.write("\n")


def decode_json(folder: Path, k: int, vocab_size: int) -> Decoded:
    """Line by line."""
    ids, logprobs = [], []
    with (folder / "x.jsonl").open() as file:
        for line in file:
            sample = json.loads(line)
            ids += sample["ids"]
            logprobs += sample["logprobs"]
    there = np.arange(k) < np.array([len(row) for row in ids])[:, None]
    return _padded(there, np.concatenate(ids), np.concatenate(logprobs))


LAYOUTS = {
    "Megatron-LM": Layout(encode_megatron, decode_megatron),
    "DistillKit": Layout(encode_distillkit, decode_distillkit, sampled=False),
    "HDF5 gzip": Layout(encode_hdf5, decode_hdf5),
    "Parquet zstd": Layout(encode_parquet, decode_parquet),
    "JSON lines": Layout(encode_json, decode_json),
}
