"""Show what a store holds, or what training runs have measured, at a glance.

    python -m distill.inspect outputs/demo.zarr [CONFIG.yaml ...] [store.options.KEY=VALUE ...]
    python -m distill.inspect outputs/student [outputs/other ...]              # held-out figures, side by side

Of a store: what it holds and how complete it is, from which teacher, the size of each array, and some rows in words:
a token, and the five tokens that the teacher expects next.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.config.generate import GenerateConfig
from distill.data.show import marked
from distill.errors import ConfigError, DistillError, UserError
from distill.run.log import adapt_to_machine
from distill.settings import expand, load, split
from distill.store.store import Store
from distill.student.metrics import is_run, side_by_side
from distill.teacher.choice import Choice
from distill.teacher.source import local_tokenizer
from distill.teacher.summary import human, table

_USAGE = (
    "usage: python -m distill.inspect STORE [CONFIG.yaml ...] [store.options.KEY=VALUE ...], "
    "or the folders of training runs"
)
_SHOWN_ROWS = 8
_SHOWN_IDS = 5


def main(arguments: Sequence[str]) -> int:
    """Print the description of the store, or of the training runs, that are named; return the exit status, 0 or 2."""
    adapt_to_machine()
    if {"--help", "-h"} & {*arguments}:
        print(f"{_USAGE}\n\n{__doc__}")
        return 0
    try:
        settings, paths = split(arguments, "store.options")
        paths = [expand(path, "STORE") for path in paths]
        folders = [Path(path) for path in paths]
        if folders and not settings and all(map(is_run, folders)):
            print(side_by_side(folders))
            return 0
        if len(paths) != 1:
            raise ConfigError(f"expected one store, or folders of training runs, found {len(paths)} paths; {_USAGE}")
        print(describe(Store.existing(paths[0], load(GenerateConfig, settings).store.options)))
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # of head, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains again at its end
    return 0


def describe(store: Store) -> str:
    """The whole description, as printed."""
    found = store.attributes
    committed, lengths = store.committed(), store.read_all("sample_length")
    tokens = int(store.tokens_per_block()[committed].sum())
    state = "complete"
    if not store.complete or not committed.all():
        state = f"unfinished: {committed.sum()} of {len(committed)} blocks, {tokens:,} tokens"
    sizes = {name: store.describe(name) for name in store.array_names()}
    total = sum(size for _, _, size in sizes.values())
    teacher = found["teacher"]
    head = table(
        {
            store.path: f"{found['format']}, version {found['version']}, {state}",
            "teacher": f"{teacher['model']} ({teacher['architecture']}, {teacher['dtype']}), "
            f"vocabulary {found['vocab_size']:,}, tokenizer {found['tokenizer']['vocab_size']:,}",
            "data": f"{found['num_samples']:,} samples, {found['num_tokens']:,} tokens, "
            f"{lengths.min()} to {lengths.max()} a sample, {lengths.mean():.0f} on average",
            "capture": f"{found['method']}, k {found['k']}, temperatures {found['temperatures']}",
            **_unknown(found),
            **Choice.of(store).lines(found["vocab_size"], found["config"].get("store.codec", "portable")),
            "layout": f"{len(committed)} blocks of {store.block_rows:,} rows",
            "size": f"{human(total)}, {total / max(1, tokens):.0f} bytes/token",
            "made with": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        }
    )
    arrays = [f"{'array':16}{'shape':>16}{'dtype':>10}{'size':>12}{'bytes/token':>13}"]
    for name, (shape, dtype, size) in sizes.items():
        shown = " x ".join(map(str, shape))
        arrays.append(f"{name:16}{shown:>16}{dtype:>10}{human(size):>12}{size / max(1, tokens):>13.1f}")
    tokenizer = local_tokenizer(teacher["model"], teacher["revision"])
    return "\n\n".join([head, "\n".join(arrays), *_examples(store, committed, tokenizer)])


def _unknown(found: dict[str, Any]) -> dict[str, str]:
    """Of a store that others captured: how, and what it does not say."""
    if "unknown" not in found:
        return {}
    form = found.get("captured", {}).get("form", "unknown")
    return {"provenance": f"captured by others, read as {form}; unknown: {', '.join(found['unknown'])}"}


def _examples(store: Store, committed: NDArray[np.bool_], tokenizer: Any) -> list[str]:
    """A sample with what is trained on marked, and the first rows of two in words; none where nothing is committed."""
    starts, lengths = store.read_all("sample_start"), store.read_all("sample_length")
    there = np.flatnonzero(committed[starts // store.block_rows] & (lengths > 1))
    shown = [_marked(store, int(starts[sample]), int(lengths[sample]), tokenizer) for sample in there[:1] if tokenizer]
    return [
        *shown,
        *(_example(store, int(sample), int(starts[sample]), int(lengths[sample]), tokenizer) for sample in there[:2]),
    ]


def _marked(store: Store, start: int, length: int, tokenizer: Any) -> str:
    tokens = store.read_rows("tokens", start, start + length)
    mask = store.read_rows("loss_mask", start, start + length) if "loss_mask" in store.array_names() else None
    return f"the first sample, «what is trained on»:\n{marked(tokenizer, tokens, mask)}"


def _example(store: Store, sample: int, start: int, length: int, tokenizer: Any) -> str:
    def words(token: int) -> str:
        text = tokenizer.decode([int(token)]) if tokenizer else ""
        return repr(text) if text else f"#{token}"  # ids beyond the tokenizer's vocabulary have no text

    stop = start + min(length, _SHOWN_ROWS)
    tokens, ids = store.read_rows("tokens", start, stop), store.read_rows("target_ids", start, stop)
    logprobs = store.read_rows("target_logprobs", start, stop).astype(np.float32)
    example = store.read_rows("sample_index", sample, sample + 1)[0]
    lines = [
        f"sample {sample} (example {example} of the dataset, {length} tokens): token -> what the teacher expects next"
    ]
    for token, candidates, chances in zip(tokens, ids, np.exp(logprobs), strict=True):
        following = [
            f"{words(i)} {'(drawn)' if np.isnan(p) else f'{p:.2f}'}"
            for i, p in zip(candidates[:_SHOWN_IDS], chances, strict=False)
            if i >= 0
        ]
        lines.append(f"  {words(token):16} -> {'  '.join(following)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
