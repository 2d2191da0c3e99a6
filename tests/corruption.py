"""Damage a store in every way, and see that it is named, never read as something else, and taken back.

    python -m tests.corruption 200 [SEED]     # so many damages, a table of what came of them; status 1 if one escapes

Each damage is to one kind of file, chosen evenly: the zarr.json of the root and of each array, and the chunks of each.
A bit is flipped, the file is cut short or to nothing, a part of it is zeroed, it is deleted, or it changes places
with another of its kind, or of another kind. A change after which JSON means the same is no damage. Then

1. ``distill.verify`` has to find it, and to name the file's array
2. every sample, by its number and in shuffled batches, is what it was, or a StoreError; nothing else
3. ``--repair`` and ``distill.generate`` restore every byte, unless the repair says that it cannot

Two small stores are damaged, one with a loss mask. Chunks are small, so that an array has several of each.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from distill import TeacherCache, verify
from distill.errors import StoreError
from distill.store import schema
from tests.support import CHAT_TEMPLATE, WORDS, build_model, generate_here, make_tokenizer, tree

DAMAGES = ("flip", "truncate", "empty", "zero", "delete", "swap", "swap kinds")
_SMALL = {"schema.INNER_ROWS": 64, "codecs._SAMPLE_CHUNK": 16, "codecs._CHECKSUM_CHUNK": 24}


@dataclass
class Victim:
    """An intact store, what it says, and how it was made."""

    store: Path
    arguments: list[str]
    samples: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cache = TeacherCache(str(self.store))
        self.samples, self.batches, self.bytes = [*cache], [*_batches(cache)], tree(self.store)


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Stores have small chunks while this lasts."""
    with contextlib.ExitStack() as stack:
        for name, size in _SMALL.items():
            stack.enter_context(mock.patch(f"distill.store.{name}", size))
        yield


def make(root: Path, models: dict[str, Any]) -> list[Victim]:
    """A store of texts and a store of chats."""
    build_model("llama", num_hidden_layers=1).save_pretrained(root / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "model")
    texts = [" ".join(WORDS[(i * 31 + j * j) % len(WORDS)] for j in range(1 + i * 7 % 11)) for i in range(40)]
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in texts]
    for name, rows in (
        ("texts", [{"text": text} for text in texts]),
        ("chats", [{"messages": chat} for chat in chats]),
    ):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    victims = []
    for name in ("texts", "chats"):
        arguments = [f"teacher.model={root / 'model'}", f"dataset.path={root / name}.jsonl", "capture.k=4"]
        arguments += ["store.block_rows=256", "dataset.max_length=128"]
        arguments += ["capture.method=topk", "capture.temperatures=[1.0,2.0]"] if name == "chats" else []
        store = generate_here(root, *arguments, f"store.path={root / name}.zarr", models=models)
        victims.append(Victim(store, arguments))
    return victims


def kind_of(name: str) -> str:
    """What kind of file it is: chunks of an array are of one kind."""
    return name if name.endswith("zarr.json") else f"{name.partition('/')[0]} chunk"


def damage(folder: Path, kind: str, way: str, rng: random.Random) -> list[str] | None:
    """Damage a file of this kind in this way. The files that are not what they were; None: there is no such damage."""
    there = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    one = rng.choice([name for name in there if kind_of(name) == kind])
    content = bytearray(there[one].read_bytes())
    touched = [one]
    if way == "delete":
        there[one].unlink()
        return touched
    if way.startswith("swap"):
        others = [name for name in there if name != one and (kind_of(name) == kind) == (way == "swap")]
        if not others:
            return None
        other = rng.choice(others)
        if same(there[one].read_bytes(), there[other].read_bytes()):
            return None
        touched.append(other)
        there[one].write_bytes(there[other].read_bytes())
        there[other].write_bytes(content)
        return touched
    before, at = bytes(content), rng.randrange(len(content))
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "zero":
        stop = min(len(content), at + rng.randint(1, 64))
        content[at:stop] = bytes(stop - at)
    else:
        del content[0 if way == "empty" else at :]
    if same(before, bytes(content)):
        return None
    there[one].write_bytes(content)
    return touched


def same(one: bytes, other: bytes) -> bool:
    """Whether they mean the same: equal bytes, or equal JSON."""
    with contextlib.suppress(ValueError):
        return bool(json.loads(one) == json.loads(other))
    return one == other


def escapes(victim: Victim, folder: Path, touched: list[str], models: dict[str, Any]) -> Iterator[str]:
    """What went wrong with a damaged store in `folder`, a copy of the victim's, if anything; repairs it."""
    status, said = verified(str(folder))
    arrays = {name.removesuffix("/zarr.json").partition("/")[0] for name in touched}
    lines = "\n".join(line for line in said.splitlines() if line.startswith("  "))  # not the count of commits below
    if status == 0 or not any(_named(array, lines) for array in arrays):
        yield f"verify does not name it: status {status}, {said!r}"
    yield from misread(victim, folder)
    status, said = verified(str(folder), "--repair")
    if "cannot be repaired" in said:
        yield "cannot be repaired"
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            generate_here(folder.parent, *victim.arguments, f"store.path={folder}", models=models)
    except Exception as error:
        yield f"generate after the repair ({said!r}): {type(error).__name__}: {error}"
        return
    after = tree(folder)
    if differing := sorted(name for name in {*victim.bytes, *after} if victim.bytes.get(name) != after.get(name)):
        yield f"repair ({said!r}) and generate left other bytes in {differing}"
    if (ended := verified(str(folder)))[0] != 0:
        yield f"repair and generate left damage: {ended[1]!r}"


def _named(array: str, lines: str) -> bool:
    """Whether a report names an array; damaged checksums are seen in what they are of, and in each of these."""
    if array == "checksums":
        themselves = ("  checksums/zarr.json", " checksums, block")
        return any(words in lines for words in themselves) or all(name in lines for name in schema.CAPTURED)
    if array == "commits":
        return any(words in lines for words in ("commits", "commit is missing"))
    return array in lines


def verified(*arguments: str) -> tuple[int, str]:
    """The status of distill.verify, and what it prints."""
    console = io.StringIO()
    with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
        try:
            status = verify.main(arguments)
        except Exception as error:
            return 0, f"raised {type(error).__name__}: {error}"
    return status, console.getvalue()


def misread(victim: Victim, folder: Path) -> Iterator[str]:
    """Whatever a reader is given that is neither what the victim says nor a StoreError."""

    def tried(what: str, read: Callable[[], Any], true: Any) -> Iterator[str]:
        try:
            found = read()
        except StoreError:
            return
        except Exception as error:
            yield f"{what}: {type(error).__name__}: {error}"
            return
        if true is not None and not equal(found, true):
            yield f"{what}: other values"

    try:
        cache = TeacherCache(str(folder))
    except StoreError:
        return
    except Exception as error:
        yield f"opening: {type(error).__name__}: {error}"
        return
    if len(cache) != len(victim.samples):
        yield f"opening: {len(cache)} samples"
    for i, true in enumerate(victim.samples):
        yield from tried(f"sample {i}", lambda i=i: cache[i], true)  # type: ignore[misc]
    try:
        for i, (found, true) in enumerate(zip(_batches(cache), victim.batches, strict=True)):
            if not equal(found, true):
                yield f"batch {i}: other values"
    except StoreError:
        pass
    except Exception as error:
        yield f"a batch: {type(error).__name__}: {error}"
    yield from tried("splitting", lambda: [part.lengths for part in cache.split(5)], None)


def _batches(cache: TeacherCache) -> Iterator[dict[str, Any]]:
    yield from cache.shuffled(4, seed=1, window_blocks=2)


def equal(found: dict[str, Any], true: dict[str, Any]) -> bool:
    """Whether two samples, or two batches, have the same values; NaN is one."""

    def bits(values: Any) -> bytes:
        tensor = torch.as_tensor(values)
        return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()

    return found.keys() == true.keys() and all(bits(found[name]) == bits(true[name]) for name in true)


def run(count: int, seed: int, root: Path) -> tuple[Counter[tuple[str, str]], list[str], list[str]]:
    """So many damages: how many of each kind and way; what escaped; and what could not be repaired."""
    done: Counter[tuple[str, str]] = Counter()
    escaped: list[str] = []
    hopeless: list[str] = []
    models: dict[str, Any] = {}
    torch.set_num_threads(1)
    with small_chunks():
        victims = make(root, models)
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            touched = None
            while touched is None:
                victim = rng.choice(victims)
                kind = rng.choice(sorted({kind_of(name) for name in victim.bytes}))
                way = rng.choice(DAMAGES)
                folder = root / "damaged.zarr"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(victim.store, folder)
                touched = damage(folder, kind, way, rng)
            done[kind, way] += 1
            for escape in escapes(victim, folder, touched, models):
                into = hopeless if escape == "cannot be repaired" else escaped
                into.append(f"seed {seed}, damage {number}: {way} of {' and '.join(touched)}: {escape}")
    return done, escaped, hopeless


def table(done: Counter[tuple[str, str]]) -> str:
    """How many damages there were, by kind of file and by way."""
    lines = [f"{'':28}" + "".join(f"{way:>12}" for way in DAMAGES)]
    for kind in sorted({kind for kind, _ in done}):
        lines.append(f"{kind:28}" + "".join(f"{done[kind, way] or '':>12}" for way in DAMAGES))
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found, wrong, beyond = run(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]), Path(scratch))
    print(table(found), *wrong, *beyond, sep="\n")
    print(f"{found.total()} damages, {len(wrong)} escapes, {len(beyond)} beyond repair, which said so")
    sys.exit(bool(wrong))
