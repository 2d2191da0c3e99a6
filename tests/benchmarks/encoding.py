"""Bytes, loss of precision and speed of a store's encodings, beside other layouts of the same rows.

    python -m tests.benchmarks.encoding [rows=16384] [rounds=3] [topk=8,16,32,64,128,256] [sample=8,16,24,32,50,64]

The rows are those of the demo's teacher over the help topics of CPython in a random order, in windows of 1,024 tokens;
blocks have 8,192 rows. distill writes and reads whole stores, checksums included, without the sample table. For each k:

bytes     per token, of all that the layout writes
KL        of the decoded distribution from the exact one, in nats: over the ids that were kept, and of top-k the rest,
          which is one more outcome (what the decoded ids leave of 1, where the layout does not say)
encode    rows per second of processor time, beside the portable store's; the same of decode

A store's bytes by array follow.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numcodecs
import numpy as np
import torch
import transformers
import zarr

from distill.config.generate import CaptureConfig, TeacherConfig
from distill.store.schema import CAPTURED
from distill.store.store import Store
from distill.store.writable import WritableStore
from distill.teacher.capture import Captured, as_float16, round_logprobs
from distill.teacher.method import capture
from distill.teacher.sample import uniforms
from distill.teacher.source import Source, locate
from tests.benchmarks.layouts import LAYOUTS, SAMPLE, Array, Decoded, Layout, Rows

DEFAULTS = {"rows": "16384", "rounds": "3", "topk": "8,16,32,64,128,256", "sample": "8,16,24,32,50,64"}
BLOCK_ROWS = 8192
ARRAYS = ("tokens", *CAPTURED)
ATTRIBUTES = {"temperatures": [1.0], "fingerprint": "made up", "block_rows": BLOCK_ROWS}


def windows(source: Source, num_rows: int) -> Iterator[list[int]]:
    """The token ids of texts in a random order, in windows."""
    names, total = sorted(topics), 0
    for i in np.random.default_rng(0).permutation(len(names)):
        ids = source.tokenizer(topics[names[i]])["input_ids"]
        for first in range(0, len(ids), SAMPLE):
            yield ids[first : first + SAMPLE]
            total += len(ids[first : first + SAMPLE])
        if total >= num_rows:
            return
    raise SystemExit(f"rows: expected at most {total}, found {num_rows}")


@torch.inference_mode()
def captured(source: Source, num_rows: int, settings: list[CaptureConfig]) -> tuple[Array, list[Captured]]:
    """The tokens [R], and what is kept of the teacher's rows with each of these settings."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    tokens: list[int] = []
    parts: list[list[Captured]] = [[] for _ in settings]
    for ids in windows(source, num_rows):
        following = torch.tensor([*ids[1:], -1])
        hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        row = len(tokens)
        for piece, next_ids in zip(hidden.split(256), following.split(256), strict=True):
            logits = model.get_output_embeddings()(piece).float()
            for each, config in zip(parts, settings, strict=True):
                u = torch.from_numpy(uniforms(config.seed, row, len(piece)))
                found = capture(logits.clone(), config, next_ids, u)
                assert found is not None
                each.append(found)
            row += len(piece)
        tokens += ids
    whole = [Captured.concatenate(each) for each in parts]
    cut = [Captured(*(values[:num_rows] for values in vars(found).values())) for found in whole]
    return np.array(tokens[:num_rows], np.int32), cut


def narrowed(found: Captured, k: int) -> Captured:
    """The k most probable of more ids."""
    rest = torch.cat([found.target_logprobs[:, k:], found.tail_logprob], dim=1)
    return Captured(
        found.target_ids[:, :k].contiguous(),
        found.target_logprobs[:, :k].contiguous(),
        found.logsumexp,
        torch.logsumexp(rest, dim=1, keepdim=True),
        found.next_logprob,
    )


def arrays(tokens: Array, found: Captured) -> dict[str, Array]:
    """The arrays of a store."""
    return {
        "tokens": tokens,
        "target_ids": found.target_ids.numpy(),
        "target_logprobs": round_logprobs(found.target_logprobs.numpy()),
        "logsumexp": found.logsumexp.numpy(),
        "tail_logprob": round_logprobs(found.tail_logprob.numpy()),
        "next_logprob": as_float16(found.next_logprob.numpy()),
    }


def write_store(folder: Path, method: str, codec: str, values: dict[str, Array]) -> None:
    """A store of whole blocks."""
    k, num_blocks = values["target_ids"].shape[1], len(values["tokens"]) // BLOCK_ROWS
    attributes = ATTRIBUTES | {"method": method, "k": k, "num_blocks": num_blocks}
    attributes |= {"num_samples": num_blocks, "num_tokens": len(values["tokens"]), "config": {}}
    store = WritableStore.create(str(folder / "x.zarr"), {}, attributes, planned=["tokens"], codec=codec)
    store.write_all("sample_start", np.arange(num_blocks) * BLOCK_ROWS)
    store.write_all("sample_length", np.full(num_blocks, BLOCK_ROWS, np.int32))
    store.write_all("sample_index", np.arange(num_blocks))
    parts = [{name: each[i * BLOCK_ROWS :][:BLOCK_ROWS] for name, each in values.items()} for i in range(num_blocks)]
    for block, part in enumerate(parts):
        store.write_rows("tokens", block, part["tokens"])
    store.publish()
    for block, part in enumerate(parts):
        for name in CAPTURED:
            store.write_rows(name, block, part[name])
        store.commit(block, BLOCK_ROWS)


def read_store(folder: Path) -> dict[str, Array]:
    """All its rows."""
    store = Store.existing(str(folder / "x.zarr"), {})
    return store.read_arrays(ARRAYS, 0, store.num_blocks * store.block_rows)


def log_weights(ids: Array, logprobs: Array, tail: Array) -> Array:
    """[R, K] float64: a drawn id, which has no log-probability, weighs an equal part of what was sampled."""
    drawn = (ids >= 0) & np.isnan(logprobs)
    part = tail.astype(np.float64) - np.log(np.maximum(drawn.sum(axis=1, keepdims=True), 1))
    return np.where(drawn, part, np.where(ids >= 0, logprobs.astype(np.float64), -np.inf))


def divergence(exact: Array, tail: Array | None, decoded: Array, decoded_tail: Array | None) -> float:
    """Mean KL over rows: log weights [R, K], and of top-k the log of the rest, [R, 1]."""
    p, q = np.exp(exact.astype(np.float64)), np.exp(decoded.astype(np.float64))
    if tail is not None:
        left = np.clip(1 - q.sum(axis=1, keepdims=True), 1e-7, None)
        q = np.concatenate([q, left if decoded_tail is None else np.exp(decoded_tail.astype(np.float64))], axis=1)
        p = np.concatenate([p, np.exp(tail.astype(np.float64))], axis=1)
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * np.log(p / q), 0).sum(axis=1).mean())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds of processor time that it takes, in all threads."""
    began = time.process_time()
    found = run()
    return found, time.process_time() - began


def size(folder: Path, name: str = "") -> int:
    """The bytes of all files below."""
    return sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())


def compare(method: str, tokens: Array, found: Captured, vocab_size: int, rounds: int) -> None:
    """All layouts in turn, `rounds` times; print bytes, KL, and the median ratios of speed."""
    values = arrays(tokens, found)
    ids, tail = values["target_ids"], found.tail_logprob.numpy()
    exact = log_weights(ids, found.target_logprobs.numpy(), tail)
    rows = Rows(tokens, ids, exact.astype(np.float32), vocab_size)
    others = {name: layout for name, layout in LAYOUTS.items() if layout.sampled or method == "topk"}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ("portable", "compact", *others)}
    lines = {}
    for _ in range(rounds):
        for name, times in spent.items():
            folder = Path(tempfile.mkdtemp())
            if name in others:
                decoded, *seconds = run_other(folder, others[name], rows)
                num_bytes, decoded_tail = size(folder), None
            else:
                _, writing = timed(lambda: write_store(folder, method, name, values))  # noqa: B023
                read, reading = timed(lambda: read_store(folder))  # noqa: B023
                seconds, decoded_tail = [writing, reading], read["tail_logprob"]
                weights = log_weights(read["target_ids"], read["target_logprobs"], decoded_tail)
                decoded, num_bytes = (read["target_ids"], weights), sum(size(folder / "x.zarr", a) for a in ARRAYS)
            assert (decoded[0] == ids).all(), name
            kl = divergence(exact, tail if method == "topk" else None, decoded[1], decoded_tail)
            times.append((seconds[0], seconds[1]))
            lines[name] = f"{num_bytes / len(tokens):8.1f} bytes/token, KL {kl:.1e}"
            shutil.rmtree(folder)
    for name, line in lines.items():
        speeds = []
        for i, what in enumerate(("encode", "decode")):
            ratios = [base[i] / own[i] for base, own in zip(spent["portable"], spent[name], strict=True)]
            rate = len(tokens) / statistics.median(own[i] for own in spent[name])
            speeds.append(f"{what} {statistics.median(ratios):6.2f}x ({rate:9,.0f} rows/s)")
        print(f"  {name:13s} {line}, {', '.join(speeds)}", flush=True)


def run_other(folder: Path, layout: Layout, rows: Rows) -> tuple[Decoded, float, float]:
    """The rows again, and the seconds to encode and to decode."""
    _, writing = timed(lambda: layout.encode(folder, rows))
    decoded, reading = timed(lambda: layout.decode(folder, rows.ids.shape[1], rows.vocab_size))
    return decoded, writing, reading


def by_array(method: str, tokens: Array, found: Captured) -> None:
    """Print the bytes of each array of a store, with both codecs."""
    values = arrays(tokens, found)
    for codec in ("portable", "compact"):
        folder = Path(tempfile.mkdtemp())
        write_store(folder, method, codec, values)
        each = {name: size(folder / "x.zarr", name) / len(tokens) for name in ARRAYS}
        shutil.rmtree(folder)
        parts = ", ".join(f"{name} {num_bytes:.2f}" for name, num_bytes in each.items())
        print(f"  {codec}: {parts}; all {sum(each.values()):.1f}", flush=True)


def main(arguments: list[str]) -> None:
    """Capture the rows once, then compare."""
    settings = DEFAULTS | dict(argument.split("=") for argument in arguments)
    num_rows = int(settings["rows"]) // BLOCK_ROWS * BLOCK_ROWS
    source = locate(TeacherConfig())
    topk, sampled = ([int(k) for k in settings[method].split(",")] for method in ("topk", "sample"))
    configs = [CaptureConfig("topk", max(topk)), *(CaptureConfig("sample", k) for k in sampled)]
    tokens, (most, *samples) = captured(source, num_rows, configs)
    found = {("topk", k): narrowed(most, k) for k in topk} | {
        ("sample", k): each for k, each in zip(sampled, samples, strict=True)
    }
    torch.set_num_threads(1)
    numcodecs.blosc.use_threads = False
    zarr.config.set({"threading.max_workers": 1})
    print(f"{num_rows:,} rows of {source.folder.name}; zarr {zarr.__version__}, torch {torch.__version__}")
    for (method, k), each in found.items():
        num_ids = float((each.target_ids >= 0).sum(dim=1).double().mean())
        print(f"{method} k={k}: {num_ids:.1f} ids a row")
        compare(method, tokens, each, source.vocab_size, int(settings["rounds"]))
        by_array(method, tokens, each)


if __name__ == "__main__":
    main(sys.argv[1:])
