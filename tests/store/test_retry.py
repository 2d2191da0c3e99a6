"""What is tried again and what is not, with what is said of it; all in this process, of failures that are made up."""

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from distill.errors import StorageError, StoreError
from distill.store import retry
from distill.store.reasons import in_words, is_about_storage, is_transient
from distill.store.retry import RetryingStore
from tests.store.test_store import create, values

RUST = "Generic S3 error: Error performing PUT http://host:1/bucket/key?sig=SECRET in 3ms - {}\n\nDebug source:\n{}"
ANSWER = "Server returned non-2xx status code: {}: <?xml version='1.0'?>\n<Error><Code>{}</Code><Message>{}</Message>"
SENT = "HTTP error: error sending request"


def from_obstore(said: str, source: str = "", kind: str = "GenericError") -> Exception:
    from obstore import exceptions

    error: Exception = getattr(exceptions, kind)(RUST.format(said, source))
    return error


def plain(said: str) -> Exception:
    from obstore.exceptions import GenericError

    error: Exception = GenericError(said)
    return error


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number), "file")


FAILURES: dict[str, tuple[Exception, bool, str]] = {
    "stale": (of(errno.ESTALE), True, "Stale file handle"),
    "interrupted": (of(errno.EINTR), True, "Interrupted system call"),
    "again": (of(errno.EAGAIN), True, "Resource temporarily unavailable"),
    "timed out": (of(errno.ETIMEDOUT), True, "Connection timed out"),
    "busy": (of(errno.EBUSY), True, "Device or resource busy"),
    "full": (of(errno.ENOSPC), False, "No space left on device"),
    "quota": (of(errno.EDQUOT), False, "Disk quota exceeded"),
    "read-only": (of(errno.EROFS), False, "Read-only file system"),
    "permission": (of(errno.EACCES), False, "Permission denied"),
    "broken disk": (of(errno.EIO), False, "Input/output error"),
    "no answer": (TimeoutError(), True, "no answer in time"),
    "frozen": (from_obstore(SENT, "kind: Timeout, source: TimedOut"), True, "no answer in time"),
    "refused": (from_obstore(SENT, "message: Connection refused"), True, "connection refused"),
    "lost": (from_obstore(SENT, "hyper::Error(IncompleteMessage)"), True, "the connection was lost"),
    "no name": (from_obstore(SENT, "dns error"), True, "the name of its host is not known"),
    "slow down": (from_obstore(ANSWER.format("503 Service Unavailable", "SlowDown", "Reduce your rate.")), True,
                  "Reduce your rate (SlowDown)"),
    "too many": (from_obstore("Server returned non-2xx status code: 429 Too Many Requests: "), True,
                 "it answered (429 Too Many Requests)"),
    "broken server": (from_obstore(ANSWER.format("500 Internal Server Error", "InternalError", "")), True,
                      "it answered (InternalError)"),
    "expired": (from_obstore(ANSWER.format("400 Bad Request", "ExpiredToken", "The token has expired.")), False,
                "The token has expired (ExpiredToken)"),
    "wrong key": (from_obstore("Server returned non-2xx status code: 403 Forbidden: ", kind="PermissionDeniedError"),
                  False, "access denied; are the credentials right? (403 Forbidden)"),
    "no length": (plain("Generic HTTP error: Content-Length Header missing from response"), False,
                  "it does not say how long a file is (Content-Length)"),
    "no part": (plain("Generic HTTP error: Content-Range header not present in partial response"),
                False, "it does not say which part of a file it sends (Content-Range)"),
    "another part": (plain("Generic HTTP error: Requested 90..95, got 0..5"), False,
                     "Generic HTTP error: Requested 90..95, got 0..5"),
    "lost on the web": (plain(f"Generic HTTP error: Error performing GET http://h/x - {SENT}"), True,
                        "the connection was lost"),
    "full folder": (from_obstore("cannot write: No space left on device (os error 28)"), False,
                    "No space left on device"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_failures_in_words(name: str) -> None:
    error, passes, words = FAILURES[name]
    assert is_about_storage(error)
    assert is_transient(error) == passes
    assert in_words(error) == words


def test_answers_are_no_failures() -> None:
    assert not is_about_storage(FileNotFoundError("Object at location x not found: <Code>NoSuchKey</Code>"))
    assert is_about_storage(FileNotFoundError("Object at location x not found: <Code>NoSuchBucket</Code>"))
    assert not is_about_storage(from_obstore("", kind="AlreadyExistsError"))
    assert not is_about_storage(from_obstore("", kind="PreconditionError"))
    assert not is_about_storage(ValueError("a codec's"))


class Failing(LocalStore):
    """A folder whose reads, writes and listings fail as often as `failures` has errors."""

    failures: list[Exception]

    async def _fails(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        await self._fails()
        return await super().get(*args, **kwargs)

    async def set(self, *args: Any) -> None:
        await self._fails()
        await super().set(*args)

    async def list_prefix(self, prefix: str) -> Any:
        listed = [key async for key in super().list_prefix(prefix)]
        for key in listed[:1]:
            yield key
        await self._fails()  # in the middle
        for key in listed[1:]:
            yield key


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RetryingStore, list[Exception]]]:
    """A store with some objects, which fails as told from now on; nobody waits long."""
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(retry, "_OPENING_SECONDS", 0.05)
    monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 0.3)
    for name in ("a", "b", "c", "lease.json"):
        (tmp_path / name).write_text(name)

    def make(answered: bool = True) -> tuple[RetryingStore, list[Exception]]:
        inner = Failing(tmp_path)
        inner.failures = []
        found = RetryingStore(inner, "x.zarr")
        if answered:
            assert sync(found.get("a", default_buffer_prototype())) is not None
        return found, inner.failures

    return make


def read(place: RetryingStore, key: str) -> bytes | None:
    found = sync(place.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def test_what_passes_is_tried_again_and_said_once(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    store, failures = place()
    failures += [of(errno.ESTALE), TimeoutError(), of(errno.EINTR)]
    with caplog.at_level(logging.INFO):
        assert read(store, "b") == b"b"
    assert [record.message for record in caplog.records] == [
        "store: x.zarr: Stale file handle; trying again for up to 0 s",
        "store: x.zarr is back, after 0 s",
    ]
    failures += [of(errno.ESTALE)] * 2
    written = default_buffer_prototype().buffer.from_bytes(b"new")
    sync(store.set("b", written))
    assert read(store, "b") == b"new"
    assert not failures


def test_several_requests_that_wait_are_said_once(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    store, failures = place()
    failures += [of(errno.ESTALE)] * 7

    async def both() -> list[Any]:
        return await asyncio.gather(*(store.get(key, default_buffer_prototype()) for key in "abc"))

    with caplog.at_level(logging.INFO):
        assert all(sync(both()))
    assert len(caplog.records) == 2, caplog.text


def test_listings_begin_anew(place: Any) -> None:
    async def listed(store: RetryingStore) -> list[str]:
        return [key async for key in store.list_prefix("")]

    store, failures = place()
    failures += [of(errno.ESTALE)]
    assert sorted(sync(listed(store))) == ["a", "b", "c"], "each once, and no lease"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_what_does_not_pass_ends_at_once(number: int, place: Any) -> None:
    store, failures = place()
    failures += [of(number), AssertionError("asked again")]
    with pytest.raises(StorageError, match=f"^store: cannot read b in x.zarr: {os.strerror(number)}$"):
        read(store, "b")
    assert len(failures) == 1


def test_patience_ends(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PATIENCE_SECONDS", 1.0)
    store, failures = place()
    failures += [of(errno.ESTALE)] * 10_000
    with pytest.raises(StorageError, match=r"cannot read b in x.zarr: Stale file handle \(tried for 1 s\)"):
        read(store, "b")
    assert len(failures) < 9_999
    never, failures = place(answered=False)
    failures += [of(errno.ESTALE)] * 10_000
    with pytest.raises(StoreError, match=r"^store.path: cannot use x.zarr: Stale file handle$"):
        read(never, "b")
    known = RetryingStore(never.inner, "x.zarr", known=True)  # of a worker or a reader that opens it later
    failures[:] = [of(errno.ESTALE)] * 10_000
    with pytest.raises(StorageError, match="tried for 1 s"):
        read(known, "b")


def test_an_outage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create(tmp_path / "x.zarr")
    store.write_rows("target_logprobs", 0, values())

    async def get(*_: Any) -> None:
        raise of(errno.EIO)

    monkeypatch.setattr(LocalStore, "get", get)
    with pytest.raises(StorageError, match=r"cannot read (checksums|target_logprobs)/c/0/0 .*: Input/output error"):
        store.read_rows("target_logprobs", 0, 20)
