"""What keeps a second run out of an object store, as a file lock does locally: an object that one run renews.

``<store>/lease.json`` is created only where there is none, renewed every few seconds by a thread of the process that
holds it, and deleted at the end. Who finds one watches it: if it changes, its run lives. If it does not for a while,
or its process is known to be gone, it is taken over, by an update that succeeds only for what was read: of two that
take it over, one does. No clocks are compared. Source: conditional writes as of HTTP (RFC 9110, section 13), which
Amazon's S3 has had since 2024.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from zarr.core.sync import sync

from distill.errors import StorageError, StoreError
from distill.store.retry import LEASE, RetryingStore

logger = logging.getLogger(__name__)

_RENEWAL_SECONDS = 3.0
_DEAD_SECONDS = 15.0
_LOOK_SECONDS = 1.0

T = TypeVar("T")


class Lease:
    """A lease of a store, held until `release` or as long as this object lives; not much longer than its process.

    A server without conditional writes gives none, which is logged. Raises StoreError where another run has it.
    From then on writing to `location` raises StorageError once another run has taken it over.
    """

    def __init__(self, location: RetryingStore) -> None:
        holder = _Holder(location)
        if holder.acquire():
            location.before_writing = holder.check
            threading.Thread(target=holder.keep, name="lease", daemon=True).start()
        self.release = weakref.finalize(self, holder.release)


class _Holder:
    """One run's side of the lease. The thread that renews it knows this object, not the Lease."""

    def __init__(self, location: RetryingStore) -> None:
        import obstore
        from obstore import exceptions

        self._obstore: Any = obstore
        self._refused = (exceptions.AlreadyExistsError, exceptions.PreconditionError)
        self._unsupported = (exceptions.NotSupportedError, NotImplementedError)
        self._denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        self._location, self._client = location, getattr(location.inner, "store", None)
        self._process = os.getpid()
        self._content: dict[str, Any] = {"run": secrets.token_hex(8), "renewed": 0, **_this_process()}
        self._version: dict[str, str] = {}  # of the object as we wrote it
        self._lost, self._over, self._busy = False, threading.Event(), threading.Lock()

    def acquire(self) -> bool:
        """Take it. False where the server has no conditional writes. Raises StoreError where another run has it."""
        try:
            while not self._create() and not self._take_over():
                pass
            supported = self._is_kept()
        except self._unsupported:
            supported = False
        except StorageError as error:
            if isinstance(error.__cause__, self._denied):
                raise StoreError(f"store.path: cannot write {self._location.path}: {error}") from error
            raise
        if not supported:
            self.release()
            logger.warning(
                "store: %s has no conditional writes: a second run on it is not refused; start only one",
                self._location.path,
            )
        return supported

    def check(self) -> None:
        """Raise StorageError where another run has taken the lease."""
        if self._lost:
            raise StorageError(
                f"store: another run is writing {self._location.path}: this one was away for so long that its lease "
                f"({LEASE}) was taken"
            )

    def keep(self) -> None:
        """Renew it until `release`."""
        while not self._over.wait(_RENEWAL_SECONDS) and not self._lost:
            with self._busy:
                if self._over.is_set():
                    return
                try:
                    self._lost = not self._renew()
                except FileNotFoundError:
                    self._lost = True
                except Exception as error:  # the server is away: the store's own requests say so
                    logger.debug("the lease could not be renewed: %s", error)

    def release(self) -> None:
        """Delete it, if it is ours."""
        if os.getpid() != self._process:  # a fork's end is not ours
            return
        self._over.set()
        if not self._busy.acquire(timeout=_RENEWAL_SECONDS):  # the server does not answer
            return
        try:
            if self._is_ours():
                self._obstore.delete(self._client, LEASE)
        except Exception as error:  # it will be found unchanged, and taken over
            logger.debug("the lease could not be deleted: %s", error)
        finally:
            self._busy.release()

    def _create(self) -> bool:
        """Whether there was none, and now there is ours."""
        try:
            self._version = _version(self._ask(lambda: self._put("create")))
        except self._refused:
            return self._holds()  # of a request whose answer was lost
        return True

    def _take_over(self) -> bool:
        """Watch another run's lease. True: it is ours now; False: it is gone, or another was faster."""
        found = self._read()
        if found is None:
            return False
        seen, since = found[1], time.monotonic()
        if not _is_gone(found[0]):
            logger.info(
                "store: %s has a lease of another run; watching for %g s whether it lives",
                self._location.path, _DEAD_SECONDS,
            )  # fmt: skip
        while not _is_gone(found[0]) and time.monotonic() - since < _DEAD_SECONDS:
            time.sleep(_LOOK_SECONDS)
            asked = time.monotonic()
            found = self._read()
            if found is None:
                return False
            if found[1] != seen:
                raise StoreError(f"store.path: another run is writing {self._location.path}; wait for it, or stop it")
            if time.monotonic() - asked > _RENEWAL_SECONDS:  # the server was away, for its holder too
                since = time.monotonic()
        logger.info("store: the run that was writing %s is gone: going on in its place", self._location.path)
        return self._update(seen)

    def _update(self, seen: dict[str, str]) -> bool:
        """Whether ours is in the place of what was `seen`."""
        try:
            self._version = _version(self._ask(lambda: self._put(seen)))
        except self._refused:
            return self._holds()
        return True

    def _is_kept(self) -> bool:
        """Whether the server refuses what it should: to create what is there, and to update what has changed since."""
        if self._succeeds("create"):
            return False
        before = self._version
        self._content["renewed"] += 1
        if not self._update(before):
            raise StoreError(f"store.path: another run is writing {self._location.path}; wait for it, or stop it")
        return not self._succeeds(before)

    def _succeeds(self, mode: Any) -> bool:
        try:
            self._ask(lambda: self._put(mode))
        except self._refused:
            return False
        return True

    def _renew(self) -> bool:
        """Whether it is still ours, and was renewed, perhaps by a request whose answer was lost."""
        self._content["renewed"] += 1
        try:
            self._version = _version(self._obstore.put(self._client, LEASE, self._bytes(), mode=self._version))
        except self._refused:
            return self._is_ours()
        return True

    def _holds(self) -> bool:
        """As `_is_ours`, and asked for as patiently as all the store's requests."""
        found = self._read()
        if found is None or found[0].get("run") != self._content["run"]:
            return False
        self._version = found[1]
        return True

    def _is_ours(self) -> bool:
        """Whether what is there now is what this run has written. Asks once."""
        found = self._obstore.get(self._client, LEASE)
        if _parsed(bytes(found.bytes())).get("run") != self._content["run"]:
            return False
        self._version = _version(found.meta)
        return True

    def _read(self) -> tuple[dict[str, Any], dict[str, str]] | None:
        """What the lease says, and its version; None where there is none."""

        async def read() -> tuple[dict[str, Any], dict[str, str]]:
            found = await self._obstore.get_async(self._client, LEASE)
            return _parsed(bytes(await found.bytes_async())), _version(found.meta)

        try:
            return self._ask(read)
        except FileNotFoundError:
            return None

    def _put(self, mode: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = self._obstore.put_async(self._client, LEASE, self._bytes(), mode=mode)
        return answer

    def _bytes(self) -> bytes:
        return json.dumps(self._content).encode()

    def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        return sync(self._location.attempt(f"lock {LEASE}", request))


def _version(of: Mapping[str, Any]) -> dict[str, str]:
    """What a conditional update names."""
    return {name: of[name] for name in ("e_tag", "version") if of.get(name) is not None}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, also in another container of this machine, or after it was started anew.

    Empty where /proc does not tell.
    """
    try:
        return {
            "host": socket.gethostname(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "user": os.getuid(),
            "pids": str(Path("/proc/self/ns/pid").readlink()),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
    except OSError:
        return {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote this was one of this machine, and is no more."""
    here = _this_process()
    if not here or any(holder.get(name) != here[name] for name in ("boot", "pids", "user")):
        return False
    try:
        return holder.get("started") != _started(int(holder["pid"]))
    except (OSError, KeyError, ValueError):
        return True


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks. Raises ProcessLookupError where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    if fields[0] in "ZX":  # it has only to be reaped
        raise ProcessLookupError(pid)
    return fields[19]
