"""Whether a store is what its format promises: metadata, the plan, and each block. Reads everything, changes nothing.

S samples, K kept ids, N rows in use.
"""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import StoreError
from distill.store.location import locate, marks
from distill.store.metadata import (
    DamageError,
    Document,
    array_digest,
    array_documents,
    attributes_of,
    group_document,
    is_sealed,
    problem_of_array,
    problem_of_group,
    refuse_strangers,
    was_interrupted,
)
from distill.store.requests import contents
from distill.store.rules import broken_rules
from distill.store.schema import PLANNED, SAMPLE_TABLE
from distill.store.store import Store

_STEP_ROWS = 1 << 16
_STEP_SAMPLES = 1 << 22
_BLOCKS_AT_A_TIME = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what takes it back.

    block:     its commit has to be removed: distill.generate makes the block again
    keys:      chunks of the plan that have to be removed: distill.generate writes them again
    document:  a zarr.json, and what has to be in it
    With none of the three, nothing can be done.
    """

    where: str
    what: str
    block: int | None = None
    keys: tuple[str, ...] = ()
    document: tuple[str, Document] | None = None

    @property
    def hopeless(self) -> bool:
        """Whether nothing takes it back."""
        return self.block is None and not self.keys and self.document is None

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


def metadata_problems(path: str, options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the zarr.json of the group and of each array.

    Raises StoreError where there is no store, or one of another version.
    """
    location = locate(path, options, read_only=True)
    if (found := marks(path, location)) is None:
        raise StoreError(f"store.path: found no store at {path}")
    content, commits = found
    refuse_strangers(path, content, commits)
    wrong = problem_of_group(content)
    copies = [attributes for attributes in map(attributes_of, (content, commits)) if is_sealed(attributes)]
    if not copies:
        return [Problem("zarr.json", f"{wrong}, and there is no copy of its attributes in commits/zarr.json")]
    attributes = copies[0]
    plan_attributes = {**attributes, "complete": False}
    problems = []
    if wrong:
        problems.append(Problem("zarr.json", wrong, document=("zarr.json", group_document(plan_attributes))))
    if commits is None and was_interrupted(location, attributes):
        return problems  # there is nothing yet
    names = list(attributes["arrays"])
    fresh: dict[str, Document] = {}
    for name, document in zip(names, contents(location, [f"{name}/zarr.json" for name in names]), strict=True):
        wrong = problem_of_array(name, document, attributes)
        if not wrong and name == "commits" and attributes_of(document) != plan_attributes:
            wrong = "does not have the attributes of zarr.json"
        if wrong:
            codec = attributes["config"].get("store.codec", "portable")
            fresh = fresh or array_documents(attributes, names, codec)
            made = fresh[name] | ({"attributes": plan_attributes} if name == "commits" else {})
            same = array_digest(made) == attributes["arrays"][name]  # another version of zarr may write another
            remedy = (f"{name}/zarr.json", made) if same else None
            problems.append(Problem(f"{name}/zarr.json", wrong, document=remedy))
    return problems


def plan_problems(store: Store) -> list[Problem]:
    """What is wrong with the sample table, and with the checksums of what the plan wrote."""
    problems = [problem for name in SAMPLE_TABLE for problem in _chunk_problems(store, name)]
    if not problems:
        problems += _table_problems(store)
    sums = _chunk_problems(store, "plan_checksums")
    keys = tuple(store.chunk_keys("plan_checksums"))
    if not sums and store.tokens_digest() != store.attributes["tokens_digest"]:
        sums = [Problem("plan_checksums", "does not match the digest in the attributes", keys=keys)]
    return problems + sums


def _chunk_problems(store: Store, name: str) -> list[Problem]:
    each, problems = store.chunk_length(name), []
    size = store.num_samples if name in SAMPLE_TABLE else store.num_blocks
    for key, start in zip(store.chunk_keys(name), range(0, size, each), strict=True):
        try:
            store.read_rows(name, start, min(start + each, size))
        except DamageError as error:
            lost = contents(store.location, [key]) == [None]
            problems.append(Problem(f"{key} is missing" if lost else error.what, "", keys=(key,)))
    return problems


def _table_problems(store: Store) -> list[Problem]:
    """What no plan would write. Nothing takes it back: the store was made so."""
    found, tokens, after = set(), 0, 0
    for first in range(0, store.num_samples, _STEP_SAMPLES):
        bounds = first, min(first + _STEP_SAMPLES, store.num_samples)
        starts, lengths, index = (store.read_rows(name, *bounds) for name in SAMPLE_TABLE)
        ends = starts + lengths
        crossing = starts // store.block_rows != (ends - 1) // store.block_rows
        tokens += int(lengths.sum(dtype=np.int64))
        rules = {
            "sample_length: a sample has no rows": (lengths < 1).any(),
            "sample_start: samples overlap, or are not in order": (starts < [after, *ends[:-1]]).any(),
            "sample_start: a sample is in two blocks": crossing.any(),
            "sample_index: a number is negative": (index < 0).any(),
        }
        found |= {rule for rule, broken in rules.items() if broken}
        after = int(ends[-1])
    if tokens != store.attributes["num_tokens"]:
        found.add(f"sample_length: the samples have {tokens:,} tokens, the attribute num_tokens says otherwise")
    return [Problem(rule, "") for rule in sorted(found)]


@dataclass(frozen=True)
class BlockCheck:
    """Which blocks there are to check, and what of each can be checked.

    committed: [B]. tokens: [B] rows in use, None where the sample table is damaged.
    planned: whether plan_checksums is sound, so that tokens and loss_mask can be compared with it
    """

    committed: NDArray[np.bool_]
    tokens: NDArray[np.int64] | None
    planned: bool

    def problems(self, store: Store, block: int) -> list[Problem]:
        """What is wrong with a block."""
        names = store.planned if self.planned else []
        problems, committed = [], bool(self.committed[block])
        if committed and (wrong := self._commit(store, block)):
            problems.append(Problem(f"block {block}:", wrong, block=block))
        used, last = _rows_in_use(store, block) if self.tokens is not None else (None, np.zeros(0))
        damaged: dict[str, Problem] = {}
        broken: set[str] = set()
        for first in range(0, store.block_rows, _STEP_ROWS):
            stop, start = min(first + _STEP_ROWS, store.block_rows), block * store.block_rows
            rows = {}
            for name in (*names, *(store.captured if committed else ())):
                try:
                    rows[name] = store.read_rows(name, start + first, start + stop)
                except DamageError as error:
                    planned = name in PLANNED
                    keys = (store.chunk_key(name, block),) if planned else ()
                    damaged[name] = Problem(error.what, "", None if planned else block, keys)
            if used is not None and len(rows) == len(names) + committed * len(store.captured):
                rows["last"] = last[first:stop]
                here = {name: values[used[first:stop]] for name, values in rows.items()}
                broken |= {*broken_rules(here, store.attributes)}
        problems += damaged.values()
        for rule in sorted(broken):  # tokens are what the tokenizer gave: they are no better the next time
            problems.append(Problem(f"block {block}:", rule, block=None if rule.startswith("tokens") else block))
        return problems

    def _commit(self, store: Store, block: int) -> str:
        try:
            rows = int(store.read_rows("commits", block, block + 1)[0])
        except DamageError as error:
            return error.what
        if rows < 0:  # of a store that is not listed
            return "its commit is missing"
        expected = rows if self.tokens is None else int(self.tokens[block])
        return "" if rows == expected else f"commits says {rows} rows, its samples have {expected}"


def _rows_in_use(store: Store, block: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[block_rows] each: whether a sample has the row, and whether it is a sample's last one."""
    samples = store.samples_of(block)
    change = np.zeros(store.block_rows + 1, np.int64)
    starts = store.read_rows("sample_start", samples.start, samples.stop) - block * store.block_rows
    ends = starts + store.read_rows("sample_length", samples.start, samples.stop)
    np.add.at(change, starts, 1)
    np.add.at(change, ends, -1)
    last = np.zeros(store.block_rows + 1, np.bool_)
    last[ends - 1] = True
    return change[:-1].cumsum() > 0, last[:-1]


def block_problems(
    store: Store, options: Mapping[str, Any], check: BlockCheck, processes: int
) -> Iterator[tuple[int, list[Problem]]]:
    """Each block, and what is wrong with it, from so many processes; in no particular order."""
    if processes == 1:
        threads = ThreadPoolExecutor(
            _BLOCKS_AT_A_TIME if "://" in store.path else 1
        )  # over a link answers are waited for
        try:
            yield from zip(
                range(store.num_blocks),
                threads.map(partial(check.problems, store), range(store.num_blocks)),
                strict=True,
            )
        finally:
            threads.shutdown(cancel_futures=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (store.path, options, check)) as pool:
        step = max(1, min(64, store.num_blocks // (4 * processes)))
        runs = [range(at, min(at + step, store.num_blocks)) for at in range(0, store.num_blocks, step)]
        for found in pool.map(_work, runs):
            yield from found


_told: list[tuple[str, Mapping[str, Any], BlockCheck]] = []
_opened: list[Store] = []


def _begin(*told: Any) -> None:
    _told.append(told)


def _work(blocks: Sequence[int]) -> list[tuple[int, list[Problem]]]:
    ((path, options, check),) = _told
    if not _opened:  # here, where an error is the caller's
        _opened.append(Store.existing(path, options, known=True))
    (store,) = _opened
    return [(block, check.problems(store, block)) for block in blocks]
