"""Prompts as token ids, read once and kept beside the rollouts, so that all workers and all restarts have the same.

P prompts, N tokens of all prompts.
"""

import array
import contextlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distill.config.data import DatasetConfig
from distill.config.rollout import PromptsConfig
from distill.data.asked import ask
from distill.data.dataset import find
from distill.data.form import Encoded
from distill.errors import ConfigError, DataError, UserError
from distill.reading.cache import TeacherCache
from distill.store.store import Store
from distill.teacher.source import Source

logger = logging.getLogger(__name__)

_BATCH_EXAMPLES = 256


@dataclass(frozen=True)
class Prompts:
    """Prompts one after the other.

    tokens: [N] int32. ends: [P] int64, where each prompt ends in tokens. numbers: [P] int64, the example of the dataset
    (of a store: the sample) that each is from
    """

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> NDArray[np.int32]:
        """The tokens of a prompt."""
        return np.asarray(self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]])


class Reader:
    """Where the prompts are.

    identity: what identifies them beside the settings
    """

    def __init__(self, config: PromptsConfig, source: Source) -> None:
        """source: the student's. Raises UserError where there are none."""
        self._config, self._source, self._path = config, source, config.path
        self._is_store = "://" in self._path or (Path(self._path) / "zarr.json").is_file()
        with of_prompts():
            if self._is_store:
                _refuse_what_a_store_lacks(config)
                self._cache = TeacherCache(self._path)
                self._cache.check_tokenizer(source.tokenizer)
                self.identity: dict[str, Any] = {"prompts.store": self._cache.attributes["fingerprint"]}
            else:
                settings = {name: value for name, value in vars(config).items() if name != "max_length"}
                self._data = find(DatasetConfig(**settings))
                self.identity = {
                    name.replace("dataset.", "prompts."): value for name, value in self._data.identity.items()
                }

    def read(self, context_length: int | None) -> Prompts:
        """All prompts. context_length: the student's. What was read and what was dropped is logged in a line.

        Raises DataError for what is not as it should be, with the example's number, and where nothing is left.
        """
        tokens, ends, numbers = array.array("i"), array.array("q"), array.array("q")
        counts, number = Counter[str](), -1
        with of_prompts():
            for number, (encoded, may_be_cut) in enumerate(self._of_store() if self._is_store else self._of_dataset()):
                counts.update(encoded.notes)
                kept = self._kept(encoded, may_be_cut, context_length, counts)
                if kept:
                    tokens.extend(kept)
                    ends.append(len(tokens))
                    numbers.append(number)
            if not self._is_store:
                self._data.check_unchanged()
        parts = [f"prompts: {number + 1:,} examples of {self._path}, read as {self._form}"]
        parts += [f"{count:,} {what}" for what, count in counts.items()]
        report = "; ".join([*parts, *([] if self._is_store else self._data.notes)])
        if not ends:
            raise DataError(f"prompts.path: expected something to continue, found nothing; {report}")
        logger.info("%s", report)
        found = Prompts(np.asarray(tokens, np.int32), np.asarray(ends, np.int64), np.asarray(numbers, np.int64))
        if (largest := int(found.tokens.max())) >= self._source.vocab_size:
            raise ConfigError(
                f"student.model: expected token ids below {self._source.vocab_size}, the model's vocabulary, found "
                f"{largest} in the prompts: the model was not resized for its tokenizer"
            )
        return found

    def _kept(
        self, encoded: Encoded, may_be_cut: bool, context_length: int | None, counts: Counter[str]
    ) -> list[int] | None:
        """The tokens that are continued; None for an example that is dropped. counts: what is dropped or cut."""
        tokens, limit = encoded.tokens, self._config.max_length
        if tokens and limit is not None and len(tokens) > limit and may_be_cut:
            counts[f"cut at {limit:,} tokens"] += 1
            tokens = tokens[:limit]
        why = ""
        if not tokens:
            why = encoded.dropped or "empty"
        elif limit is not None and len(tokens) > limit:
            why = "longer than prompts.max_length"
        elif context_length is not None and len(tokens) >= context_length:
            why = "which leave no room in the context"
        if why:
            counts[f"dropped: {why}"] += 1
        return None if why else tokens

    def _of_dataset(self) -> Iterator[tuple[Encoded, bool]]:
        """Each example's tokens, and whether they may be cut."""
        data = self._data
        form = ask(data.columns(), data.config, self._source.tokenizer, self._source.vocab_size)
        self._form = f"{form.name} ({', '.join(form.columns)})"
        rows = islice(data.rows([*form.columns, *form.optional], needed=form.columns), self._config.max_samples)
        bar = tqdm(
            rows, "prompts", unit=" examples", file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True, delay=1.0,
        )  # fmt: skip
        examples, first = iter(bar), 0
        while batch := list(islice(examples, _BATCH_EXAMPLES)):
            yield from ((encoded, form.splits) for encoded in form.encode(batch, first))
            first += len(batch)

    def _of_store(self) -> Iterator[tuple[Encoded, bool]]:
        """Each sample's tokens up to the first that is trained on; all where there is no mask, to be cut."""
        store = Store.existing(self._path, {})
        masked = "loss_mask" in store.array_names()
        if not masked and self._config.max_length is None:
            raise ConfigError(f"prompts.max_length: expected a number of tokens, as {self._path} has no loss mask")
        self._form = f"a store's samples {'up to what is trained on' if masked else 'without loss mask'}"
        names, left = ["tokens", *["loss_mask"] * masked], self._config.max_samples or store.num_samples
        for block in range(store.num_blocks):
            samples = store.samples_of(block)[:left]
            left -= len(samples)
            if not samples:
                return
            starts = store.read_rows("sample_start", samples.start, samples.stop)
            ends = starts + store.read_rows("sample_length", samples.start, samples.stop)
            arrays = store.read_arrays(names, int(starts[0]), int(ends[-1]))
            for start, end in zip(starts - starts[0], ends - starts[0], strict=True):
                tokens = arrays["tokens"][start:end]
                if masked:  # a row's mask is about the token after it
                    trained = np.flatnonzero(arrays["loss_mask"][start:end])
                    tokens = tokens[: int(trained[0]) + 1 if len(trained) else 0]
                yield Encoded(tokens.tolist(), dropped="without a token to train on"), not masked


def _refuse_what_a_store_lacks(config: PromptsConfig) -> None:
    """Raise ConfigError for a setting that would have no effect: a store has tokens, not columns."""
    for name, value in vars(config).items():
        if name not in ("path", "max_samples", "max_length") and value != getattr(PromptsConfig(), name):
            raise ConfigError(f"prompts.{name}: expected none beside the store {config.path}, found {value!r}")


@contextlib.contextmanager
def of_prompts() -> Iterator[None]:
    """Errors of the data and of a store name the keys of a rollout."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"\bdataset(?=\.\w|: )|\bstore(?=\.path)", "prompts", str(error))
        raise type(error)(text.replace("the teacher's", "the student's")) from error
