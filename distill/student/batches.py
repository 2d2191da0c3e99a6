"""What is trained on, and what each optimizer step reads of it: this worker's micro-batches, from any step on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from distill.config.train import TrainConfig
from distill.credentials import leaves
from distill.errors import ConfigError, StorageError, StoreError
from distill.reading.cache import TeacherCache
from distill.reading.samples import Batch
from distill.run.grid import Grid
from distill.run.processes import check_readers, obey_parent_only, short_socket_paths, signals_blocked
from distill.settings import expand

_LOOK_SECONDS = 1  # between two looks at the readers


def open_caches(config: TrainConfig) -> TeacherCache:
    """What ``store`` names: a store, or several of them as one. Raises ConfigError and StoreError as both do."""
    store = config.store
    paths = [store.path] if isinstance(store.path, str) else store.path
    _check_headers(paths, store.options)
    caches = [TeacherCache(path, store.options) for path in paths]
    try:
        return TeacherCache.mix(caches, store.weights, config.seed)
    except ConfigError as error:
        key = "store." if str(error).startswith("weights: ") else "store.path: "
        raise ConfigError(f"{key}{error}") from error


def _check_headers(paths: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise ConfigError where one server would be sent the headers, and so the credentials, that are for another."""
    urls = [path.lower() for path in (expand(path, "store.path") for path in paths) if "://" in path]
    servers = {"/".join(url.split("/")[: 3 if url.startswith("http") else 1]): None for url in urls}
    headers = [name for name, value in leaves(options) if "default_headers" in name.lower() and value is not None]
    if headers and len(servers) > 1:
        raise ConfigError(
            "store.options.client_options.default_headers: expected none with stores on several servers, each of which "
            f"would be sent them, found some with {' and '.join(servers)} (copy the stores of one to a folder)"
        )


def split(cache: TeacherCache, config: TrainConfig) -> tuple[TeacherCache, TeacherCache]:
    """What is trained on, and what is held out.

    Raises ConfigError where nothing is left to train on, and DataError where nothing can be measured on what is held
    out.
    """
    try:
        trained_on, held_out = cache.split(config.evaluation.samples, config.seed)
    except ConfigError as error:
        raise ConfigError(f"evaluation.samples: {error}") from error
    if not len(trained_on):
        raise ConfigError(
            f"evaluation.samples: expected fewer than the {len(cache)} samples of {cache.path}, found "
            f"{config.evaluation.samples}: nothing is left to train on"
        )
    if len(held_out):
        held_out.check_trained("that are held out")
    return trained_on, held_out


class StepBatches:
    """The micro-batches of each optimizer step, epoch after epoch.

    total_steps: optimizer steps of the whole run
    """

    def __init__(self, cache: TeacherCache, config: TrainConfig, grid: Grid) -> None:
        """cache: what is trained on. grid: tells which worker's share to read.

        Raises DataError where nothing can be learned from it.
        """
        batch = config.batch
        self._batches = cache.shuffled(batch.samples, config.seed, grid.rank, grid.world_size, batch.window_blocks)
        self._config, self._remote = config, "://" in cache.path
        self._per_epoch = self._batches.batches_per_epoch(config.batch.readers)  # micro-batches
        self._steps_per_epoch = -(-self._per_epoch // config.batch.accumulate)
        self.total_steps = config.optimizer.steps or config.optimizer.epochs * self._steps_per_epoch

    def read(self, step: int, device: torch.device) -> Iterator[list[Batch]]:
        """The micro-batches, on `device`, of optimizer step `step` (counted from 0), of the next step, and so on.

        Raises StoreError as the readers do, and ReaderError where one of them is gone.
        """
        stream, accumulate = self._stream(step, device), self._config.batch.accumulate
        for at in range(step, self.total_steps):
            left = self._per_epoch - at % self._steps_per_epoch * accumulate  # the last step of an epoch may have fewer
            yield [next(stream) for _ in range(min(accumulate, left))]

    def _stream(self, step: int, device: torch.device) -> Iterator[Batch]:
        """All micro-batches from the first one of `step` on."""
        # A remote store's client does not survive a fork. With any other store a fork saves each reader seconds.
        start_method = "forkserver" if self._remote else "fork"
        readers = self._config.batch.readers
        loader = DataLoader(
            self._batches,
            batch_size=None,
            num_workers=readers,
            worker_init_fn=obey_parent_only,
            persistent_workers=readers > 0,
            pin_memory=device.type == "cuda",
            multiprocessing_context=start_method if readers else None,
            generator=torch.Generator().manual_seed(self._config.seed),  # not from the student's random numbers
        )
        epoch, within = divmod(step, self._steps_per_epoch)
        while True:
            self._batches.set_epoch(epoch, within * self._config.batch.accumulate)
            with signals_blocked(), short_socket_paths():
                batches: Any = iter(loader)
            batches._timeout = _LOOK_SECONDS  # torch looks every 5 s; not the loader's: its readers may start slowly
            while (batch := _next(batches)) is not None:
                yield Batch({name: values.to(device, non_blocking=True) for name, values in batch.items()})
            batches._timeout = 0
            epoch, within = epoch + 1, 0


def _next(batches: Any) -> Batch | None:
    """The next batch, None at the end. A reader that is gone is noticed while others are waited for."""
    while True:
        try:
            return next(batches, None)
        except (StoreError, StorageError) as error:  # from a reader, with the reader's traceback as its message
            kind = type(error)
            raise kind(str(error).strip().rpartition(f"{kind.__name__}: ")[2]) from error
        except RuntimeError as error:
            check_readers(getattr(batches, "_workers", ()))
            if "DataLoader timed out" not in str(error):
                raise
