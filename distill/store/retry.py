"""Try again what fails for a while: a wrapper around every zarr store, of local folders and object stores alike.

Time-outs, lost connections and a server's "later" are tried again with growing pauses; what waiting does not mend is
not: no permission, no space, a read-only file system. A place that has never answered is tried for seconds only, since
its name may be wrong; one that has, for minutes. No request to a server waits for ever: its client has time-outs.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from distill.errors import StorageError, StoreError
from distill.store.reasons import in_words, is_about_storage, is_transient

logger = logging.getLogger(__name__)

LEASE = "lease.json"
"""The object that keeps other runs out (lease.py). No listing shows it."""

_PATIENCE_SECONDS = 300.0  # and one request's time-out: still less than timeout_seconds, after which a run ends
_OPENING_SECONDS = 5.0
_FIRST_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 10.0

T = TypeVar("T")


class RetryingStore(WrapperStore[Store]):
    """A zarr store whose requests are repeated while that may help.

    Raises StoreError where the place has never answered, else StorageError; both say in one line what happened.
    before_writing: called before each change, and may raise.
    """

    def __init__(self, store: Store, path: str, known: bool = False, hint: Callable[[str], str] = lambda _: "") -> None:
        """path: as the user named it. known: it has answered before. hint: what may help, from why nothing answers."""
        super().__init__(store)
        self.path, self._hint = path, hint
        self.before_writing: Callable[[], None] = lambda: None
        self._answered = known
        self._repeated = 0  # requests that are being repeated now

    @property
    def inner(self) -> Store:
        """The store that is wrapped."""
        return self._store

    def _with_store(self, store: Store) -> "RetryingStore":
        return RetryingStore(store, self.path, self._answered, self._hint)

    async def attempt(self, what: str, request: Callable[[], Awaitable[T]]) -> T:
        """What `request` returns, after as many trials as that takes. what: it does, as in "read tokens/c/0"."""
        began, pause, repeated = time.monotonic(), _PAUSE_SECONDS, False
        patience = _PATIENCE_SECONDS if self._answered else _OPENING_SECONDS
        try:
            while True:
                try:
                    found = await self._once(request)
                except Exception as error:
                    if not is_about_storage(error):
                        raise
                    waited, reason = time.monotonic() - began, in_words(error)
                    if not is_transient(error) or waited >= patience:
                        raise self._failure(what, reason, waited) from error
                    if not repeated and self._answered and not self._repeated:
                        logger.warning("store: %s: %s; trying again for up to %.0f s", self.path, reason, patience)
                    self._repeated += not repeated
                    repeated = True
                else:
                    if repeated and self._answered and self._repeated == 1:
                        logger.info("store: %s is back, after %.0f s", self.path, time.monotonic() - began)
                    self._answered = self._answered or found is not None  # no object: nor, perhaps, a bucket
                    return found
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS, patience / 5)
        finally:
            self._repeated -= repeated

    async def _once(self, request: Callable[[], Awaitable[T]]) -> T:
        if self._answered or isinstance(self._store, LocalStore):
            return await request()
        return await asyncio.wait_for(request(), _FIRST_ANSWER_SECONDS)

    def _failure(self, what: str, reason: str, seconds: float) -> StoreError | StorageError:
        if not self._answered:
            return StoreError(f"store.path: cannot use {self.path}: {reason}{self._hint(reason)}")
        tried = f" (tried for {seconds:.0f} s)" if seconds >= 1 else ""
        return StorageError(f"store: cannot {what} in {self.path}: {reason}{tried}")

    async def _change(self, what: str, request: Callable[[], Awaitable[T]]) -> T:
        self.before_writing()
        return await self.attempt(what, request)

    async def is_empty(self, prefix: str) -> bool:  # noqa: D102 - as zarr has it, like all below
        async def nothing_there() -> bool:
            async for key in self._store.list_prefix(prefix):
                if key != LEASE:
                    return False
            return True

        return await self.attempt("list", nothing_there)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:  # noqa: D102
        return await self.attempt(f"read {key}", lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(  # noqa: D102
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        wanted = list(key_ranges)
        return await self.attempt("read", lambda: self._store.get_partial_values(prototype, wanted))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:  # noqa: D102
        return await self.attempt(f"find {key}", lambda: self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:  # noqa: D102
        await self._change(f"write {key}", lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:  # noqa: D102
        if not await self.exists(key):  # not the server's own way, which some lack: no two runs write one store
            await self.set(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    async def delete(self, key: str) -> None:  # noqa: D102
        await self._change(f"delete {key}", lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:  # noqa: D102
        await self._change(f"delete {prefix}", lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:  # noqa: D102
        await self._change("delete all", self._store.clear)

    async def getsize(self, key: str) -> int:  # noqa: D102
        return await self.attempt(f"measure {key}", lambda: self._store.getsize(key))

    async def getsize_prefix(self, prefix: str) -> int:  # noqa: D102
        return await self.attempt(f"measure {prefix}", lambda: self._store.getsize_prefix(prefix))

    def list(self) -> AsyncIterator[str]:  # noqa: D102
        return self._listed(self._store.list)

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # noqa: D102
        return self._listed(lambda: self._store.list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:  # noqa: D102
        return self._listed(lambda: self._store.list_dir(prefix))

    async def _listed(self, listing: Callable[[], AsyncIterator[str]]) -> AsyncGenerator[str, None]:
        async def collect() -> "list[str]":  # whole: a listing that breaks off begins anew
            return [key async for key in listing()]

        for key in await self.attempt("list", collect):
            if key != LEASE:
                yield key
