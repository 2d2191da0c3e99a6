"""Where a store is: a local folder or the URL of an object store; who may write there, and what is safely on disk."""

import fcntl
import logging
import os
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from zarr.core.sync import sync
from zarr.storage import LocalStore

from distill.config.generate import OPTIONS_OF_ALL, is_web
from distill.credentials import keep_secret
from distill.errors import ConfigError, StorageError, StoreError, UserError, first_line
from distill.store.requests import contents
from distill.store.retry import RetryingStore
from distill.store.web import WebStore, check_address, refuse_pages

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 3.0  # workers of a run that was just killed may still be ending


_MARKS = "zarr.json", "commits/zarr.json"  # a store that lacks one of them is damaged, and no other content


def locate(path: str, options: Mapping[str, Any], read_only: bool, known: bool = False) -> RetryingStore:
    """The zarr store for a local path or a URL. Raises StoreError.

    options: of the object store's client. known: the place has answered before, to this process or to another.
    What is on a web server can only be read.
    """
    keep_secret(options)
    if "://" not in path:
        root = Path(path).absolute()  # still there after a chdir
        return RetryingStore(LocalStore(root, read_only=read_only), path, known)
    if web := is_web(path, options):
        check_address(path)
        if not read_only:
            raise StoreError(f"store.path: cannot write {path}: what is on a web server can only be read")
    try:
        import obstore
        from zarr.storage import ObjectStore
    except ImportError as error:
        raise StoreError(f"store.path: {path} needs obstore: pip install 'distill[s3]'") from error
    if not web and is_web(path, {}) and obstore.parse_scheme(path) == "http":
        others = ", ".join(sorted({*options} - {*OPTIONS_OF_ALL}))
        raise StoreError(f"store.options: expected {' or '.join(OPTIONS_OF_ALL)} for {path}, found {others}")
    given = {}
    for name, values in _client_defaults(path, options).items():
        if not isinstance(own := options.get(name, {}), Mapping):
            raise StoreError(f"store.options.{name}: expected a mapping, found a {type(own).__name__}")
        given[name] = {**values, **own}
    try:
        if web:  # from_url takes some for buckets, which need a key
            client = obstore.store.HTTPStore(path.rstrip("/"), **given)
        else:
            client = obstore.store.from_url(path, **{**options, **given})
    except BaseException as error:  # Rust's panics, of options at a wrong place, are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise StoreError(f"store.path: cannot use {path}: {first_line(error)}") from error
    store = WebStore(client, path) if web else ObjectStore(client, read_only=read_only)
    return RetryingStore(store, path, known, partial(_hint, path, options))


def local_root(location: Any) -> Path | None:
    """The folder of a store that `locate` has found; None for an object store."""
    store = location.inner if isinstance(location, RetryingStore) else location
    return Path(store.root) if isinstance(store, LocalStore) else None


def on_web(location: Any) -> WebStore | None:
    """The store on a web server that `locate` has found; None for all others."""
    store = location.inner if isinstance(location, RetryingStore) else location
    return store if isinstance(store, WebStore) else None


def _client_defaults(path: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of the client where none are given. What fails is tried again in retry.py, so the client gives up soon.

    A plain http endpoint is meant where it is named.
    """
    if path.startswith(("file:", "memory:")):
        return {}
    named = [value for name, value in {**os.environ, **options}.items() if "endpoint" in name.lower()]
    http = any(str(value).lower().startswith("http://") for value in [path, *named])
    client = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "120s"} | (
        {"allow_http": True} if http else {}
    )
    return {"client_options": client, "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}}


def _hint(path: str, options: Mapping[str, Any], reason: str) -> str:
    """What leads to a place that does not answer for this reason, where no key of it is to be seen."""
    if is_web(path, options) and reason.lower().startswith("access denied") and "default_headers" not in str(options):
        return (
            "; is the address right? What is private needs a header Authorization, below "
            "store.options.client_options.default_headers in a YAML file"
        )
    if not path.startswith("s3"):
        return ""
    seen = " ".join([*options, *(name for name in os.environ if name.startswith("AWS_"))]).lower()
    signs = ("access_key", "skip_signature", "token", "role", "container_credentials")
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or both below store.options in a YAML file"
    return "" if any(sign in seen for sign in signs) else f"; set {keys}, unless this machine has a role of its own"


def marks(path: str, location: Any) -> tuple[bytes | None, bytes | None] | None:
    """The zarr.json of a Zarr group and of its ``commits``, by which a store is known; None where nothing is.

    Raises StoreError for a file, or other content.
    """
    try:
        if "://" in path:
            # Not `exists`: only the answer to a read says why it is refused.
            found = contents(location, _MARKS)
            there = any(content is not None for content in found)
            if on_web(location) is not None:
                refuse_pages(path, *found)
            kind = "" if there or on_web(location) is not None or sync(location.is_empty("")) else "other content"
        else:
            root = Path(path)
            there = any((root / key).is_file() for key in _MARKS)
            inside = root.iterdir() if root.is_dir() and not there else []
            foreign = any(not entry.name.endswith(".partial") for entry in inside)
            kind = "a file" if root.is_file() else "a folder with other content" if foreign else ""
            found = contents(location, _MARKS) if there else []
    except (StoreError, StorageError):
        raise
    except Exception as error:  # no permission, or an object store client's own
        raise StoreError(f"store.path: cannot read {path}: {first_line(error)}") from error
    if kind:
        raise StoreError(f"store.path: expected a distill store, an empty folder or nothing at {path}, found {kind}")
    return (found[0], found[1]) if there else None


def check_writable(path: str) -> None:
    """Raise StoreError where a store at the local `path` could not be created or written; creates nothing."""
    if "://" in path:
        return
    at = Path(path).absolute()
    try:
        while not at.exists():
            at = at.parent
        writable = at.is_dir() and os.access(at, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be entered
        writable = False
    if not writable:
        raise StoreError(f"store.path: cannot write {path}: {at} is not a folder that may be written")


def refuse_inside_store(folder: Path, key: str) -> None:
    """Raise ConfigError where a local folder, which need not exist, is a store or below one: nothing else goes there.

    key: the setting that names the folder, for the message.
    """
    at = folder.resolve()
    for above in (at, *at.parents):
        if any((above / mark).is_file() for mark in _MARKS):
            raise ConfigError(f"{key}: expected a folder outside of stores, found {folder}, inside the store {above}")


class Lock:
    """A lock on a local folder, held until `release` or as long as this object lives; no longer than its process.

    File systems without such locks stay unlocked. Raises `error` where another run has the lock.
    """

    def __init__(self, folder: Path, key: str, error: type[UserError]) -> None:
        """key: the setting that names the folder, for the message."""
        self._descriptor = os.open(folder, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, self._descriptor)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            while not self._taken():
                if time.monotonic() > deadline:
                    raise error(f"{key}: another run is writing {folder}; wait for it, or stop it")
                time.sleep(0.1)
        except OSError as failure:
            logger.info("%s: %s cannot be locked (%s): let no other run write it", key, folder, failure.strerror)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def fsync(*paths: Path) -> None:
    """Wait until files and folders are on disk.

    Raises StorageError where that fails; it is never tried again: the system may have dropped what it could not write.
    """
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"cannot flush {path} to disk: {error.strerror}") from error
