"""From the examples of a dataset to samples: sequences of token ids, with a mask of what is trained on.

The loss mask of a sample is True at each position whose NEXT token is trained on; sampled log-probabilities are about
the next token too. Texts beyond `max_length` are cut
into windows. Everything else is cut at its end, or dropped: a window of a chat has no question.

S samples, N tokens of several samples.
"""

import array
import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distill.config.data import DatasetConfig
from distill.data.dataset import Data
from distill.data.files import Row
from distill.data.form import Encoded, Form
from distill.data.forms import recognize
from distill.errors import DataError
from distill.run.processes import obey_parent_only, signals_blocked

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 2.0

_TEXT_WINDOW = 1024
"""Tokens in a window of a text, with dataset.max_length=auto."""

_BATCH_EXAMPLES = 256


@dataclass(frozen=True)
class Samples:
    """Tokenized samples on disk, in the order of the dataset.

    lengths: [S] int32, the number of tokens of each sample
    source:  [S] int64, the number of its example in the dataset
    """

    lengths: NDArray[np.int32]
    source: NDArray[np.int64]
    _ends: NDArray[np.int64]
    _columns: dict[str, NDArray[Any]]

    @property
    def largest_token(self) -> int:
        """The largest token id of all samples."""
        return int(self._columns["tokens"].max())

    @property
    def columns(self) -> list[str]:
        """The names of what there is for each token, as in a store."""
        return list(self._columns)

    def without(self, column: str) -> "Samples":
        """The same samples without one of the `columns`."""
        return replace(self, _columns={name: values for name, values in self._columns.items() if name != column})

    def take(self, samples: Sequence[int] | NDArray[np.integer]) -> dict[str, NDArray[Any]]:
        """The given samples, concatenated: tokens [N] int32, source [n] int64 and what else `columns` names."""
        lengths = self.lengths[samples]
        at = np.repeat(self._ends[samples] - np.cumsum(lengths, dtype=np.int64), lengths)
        at += np.arange(len(at))  # [N], the place of each token
        return {"source": self.source[samples], **{name: values.take(at) for name, values in self._columns.items()}}


class Spool:
    """Samples while they are made: in files that nobody else sees, and that are gone with this process."""

    def __init__(self, masked: bool, sampled: bool = False) -> None:
        """masked, sampled: whether samples say which of their tokens are trained on, and have log-probabilities."""
        self._types: dict[str, type] = {"tokens": np.int32}
        self._types |= {"loss_mask": np.bool_} if masked else {}
        self._types |= {"sampled_logprob": np.float16} if sampled else {}
        self._files: dict[str, IO[bytes]] = {name: tempfile.TemporaryFile() for name in self._types}  # noqa: SIM115
        self._lengths, self._source = array.array("i"), array.array("q")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()  # what was mapped stays

    def add(self, sample: Encoded, example: int) -> None:
        """Masks and log-probabilities move to the row before: they are about the next token, and the last has none."""
        tokens, trained, logprobs = sample.tokens, sample.trained, sample.logprobs
        columns: dict[str, Any] = {
            "tokens": tokens,
            "loss_mask": trained and [*trained[1:], False],
            "sampled_logprob": logprobs and [*logprobs[1:], np.nan],
        }
        for name, file in self._files.items():
            file.write(np.asarray(columns[name], self._types[name]).tobytes())
        self._lengths.append(len(tokens))
        self._source.append(example)

    def samples(self) -> Samples:
        """All that were added."""
        lengths = np.asarray(self._lengths)
        columns: dict[str, NDArray[Any]] = {}
        for name, file in self._files.items():
            file.flush()
            there = np.memmap(file, self._types[name], "r") if len(lengths) else np.zeros(0, self._types[name])
            columns[name] = np.asarray(there)
        ends = lengths.astype(np.int64)
        np.cumsum(ends, out=ends)
        return Samples(lengths, np.asarray(self._source), ends, columns)


def tokenize(
    data: Data, tokenizer: Any, context_length: int | None, vocab_size: int | None = None, visible: bool = True
) -> Samples:
    """Read the dataset and tokenize it into samples.

    context_length, vocab_size: the teacher's. visible: show a progress bar.
    Raises DataError for a dataset that cannot be read, columns that mean nothing, values that are not what their column
    should have, samples longer than `context_length`, or nothing to train on.
    """
    config = data.config
    form, other = recognize(data.columns(), config, tokenizer, vocab_size)
    wanted = [*form.columns, *form.optional]
    rows = islice(data.rows(wanted, needed=form.columns), config.max_samples)
    limit = _limit(form, config, context_length)
    counts, example = Counter[str](), -1
    bar = tqdm(
        _encoded(form, rows, config.num_proc), "tokenizing", unit=" examples", disable=not visible, file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 10.0, dynamic_ncols=True, delay=1.0,
    )  # fmt: skip
    with Spool(form.masked, form.sampled) as spool:
        for example, encoded in enumerate(bar):
            counts.update(encoded.notes)
            for sample in _pieces(form, encoded, limit, config.long, counts):
                if len(sample.tokens) < 2 or (sample.trained is not None and not any(sample.trained[1:])):
                    counts["without a token to train on"] += 1
                else:
                    spool.add(sample, example)
        samples = spool.samples()
    data.check_unchanged()
    report = _report(data, form, other, example + 1, counts, limit)
    if not len(samples.lengths):
        raise DataError(f"dataset.path: expected something to train on, found nothing; {report}")
    logger.info("%s", report)
    longest = int(samples.lengths.argmax())
    if context_length is not None and samples.lengths[longest] > context_length:
        raise DataError(
            f"dataset.max_length: expected at most {context_length}, the teacher's context, found a sample of "
            f"{samples.lengths[longest]} tokens (example {samples.source[longest]} of {data.name})"
        )
    return samples


def _limit(form: Form, config: DatasetConfig, context_length: int | None) -> int | None:
    """The most tokens that a sample may have."""
    if config.max_length == "auto":
        return min(_TEXT_WINDOW, context_length or _TEXT_WINDOW) if form.splits else context_length
    return None if config.max_length is None else int(config.max_length)


def _pieces(form: Form, encoded: Encoded, limit: int | None, long: str, counts: Counter[str]) -> Iterator[Encoded]:
    """The samples that are made of an example. counts: what was dropped or cut is added."""
    tokens, trained, logprobs = encoded.tokens, encoded.trained, encoded.logprobs
    if not tokens:
        counts[encoded.dropped or "empty"] += 1
    elif limit is None or len(tokens) <= limit:
        yield encoded
    elif long == "drop":
        counts["too long"] += 1
    elif form.splits and long == "split":
        size = len(form.prefix) if tokens[: len(form.prefix)] == form.prefix else 0  # each window begins with them
        yield Encoded(tokens[:limit])
        for at in range(limit, len(tokens), step := max(1, limit - size)):
            yield Encoded(tokens[:size] + tokens[at : at + step])
    else:
        counts["cut"] += 1
        counts["lost"] += len(tokens) - limit if trained is None else sum(trained[limit:])
        yield Encoded(tokens[:limit], trained and trained[:limit], logprobs=logprobs and logprobs[:limit])


def _report(data: Data, form: Form, other: str, examples: int, counts: Counter[str], limit: int | None) -> str:
    """In a line: what was read and as what, what was dropped and why, what was cut."""
    parts = [f"data: {examples:,} examples of {data.name}, read as {form.name} ({', '.join(form.columns)})"]
    reasons = ("null", "empty", "without a token to train on", "too long")
    if dropped := [f"{counts.pop(reason):,} {reason}" for reason in reasons if counts[reason]]:
        parts.append(f"dropped {', '.join(dropped)}")
    if cut := counts.pop("cut", 0):
        parts.append(f"cut {cut:,} at {limit:,} tokens, with {counts.pop('lost'):,} tokens to train on")
    parts += [f"{count:,} {note}" for note, count in counts.items() if note not in reasons]
    return "; ".join([*parts, *data.notes, *([other] if other else [])])


def _encoded(form: Form, rows: Iterator[Row], num_proc: int) -> Iterator[Encoded]:
    """The examples' tokens, in order, from this process or from `num_proc` others."""
    batches = _batches(rows)
    if num_proc == 1:
        for number, batch in enumerate(batches):
            yield from form.encode(batch, number * _BATCH_EXAMPLES)
        return
    waiting: deque[Future[list[Encoded]]] = deque()
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), _begin, (form,)) as pool:
        with signals_blocked():
            pool.submit(str)  # starts all processes
        try:
            for number, batch in enumerate(batches):
                waiting.append(pool.submit(_work, batch, number * _BATCH_EXAMPLES))
                if len(waiting) > 2 * num_proc:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            _end(pool)
            raise DataError(
                f"dataset.num_proc: one of {num_proc} processes that tokenize was killed; was there enough memory?"
            ) from error


def _end(pool: Any) -> None:
    """Let a broken pool end; where it does not, end its processes, and close our end of what they read.

    The thread that feeds them waits at a full pipe for as long as one may read it, and we wait for that thread: one of
    them may be stopped, or wait for a lock that the killed one held (cpython #94777, mended in 3.12).
    """
    manager = pool._executor_manager_thread
    manager.join(_PATIENCE_SECONDS)
    if manager.is_alive():
        for process in list(pool._processes.values()):
            process.kill()
        pool._call_queue._reader.close()


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH_EXAMPLES)):
        yield batch


_forms: list[Form] = []


def _begin(form: Form) -> None:
    """In a process that tokenizes: take the form over; its tokenizer's threads did not survive the fork."""
    _forms.append(form)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    obey_parent_only(0)


def _work(rows: list[Row], first: int) -> list[Encoded]:
    return _forms[0].encode(rows, first)
