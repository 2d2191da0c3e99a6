"""A store on a web server: its files are asked for by GET, whole or in part, and nothing else is asked of the server.

Files may be behind redirects. Where a server sends a whole file instead of a part, the part is cut out of it.
"""

import logging
from typing import Any
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from distill.errors import StoreError
from distill.store.schema import CAPTURED, PLANNED

logger = logging.getLogger(__name__)

_LARGEST_WHOLE_BYTES = 1 << 24
_COMPRESSED = {"gzip", "x-gzip", "br", "zstd", "deflate", "compress"}
_OF_PAGES = "/tree/", "/blob/"


def check_address(path: str) -> None:
    """Raise StoreError for a URL with parts that would not reach the server, or that are written where all can see."""
    parts = urlsplit(path)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.query or parts.fragment:
        raise StoreError(
            f"store.path: expected a web address without ? and #, found one after {shown}; what gives access goes into "
            "a header, below store.options.client_options.default_headers in a YAML file"
        )
    if parts.username is not None:
        raise StoreError(
            f"store.path: expected a web address without user:password@, found one in {shown}; give a header "
            "Authorization, below store.options.client_options.default_headers in a YAML file"
        )


def refuse_pages(path: str, *found: bytes | None) -> None:
    """Raise StoreError where what was `found` in the place of the zarr.json of a store is nothing, or a web page."""
    contents = [content for content in found if content is not None]
    page = any(content.lstrip()[:1] == b"<" for content in contents)
    if contents and not page:
        return
    advice = (
        "; this is the address of a page for people: that of a file has /resolve/ in this place on huggingface.co, and "
        "begins with raw.githubusercontent.com on GitHub"
    )
    raise StoreError(
        f"store.path: found {'a web page and no store' if page else 'no store'} at {path}"
        f"{advice if any(part in path for part in _OF_PAGES) else ''}"
    )


class WebStore(ObjectStore[Any]):
    """A zarr store below a URL, to be read. It lists nothing.

    refused: keys of chunks over rows that the server does not give (403). Many servers say so of a file that is not
    there, and a chunk of nothing but fill values is not; what is read is compared with its checksum in any case.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, client: Any, path: str) -> None:
        """client: obstore's HTTPStore. path: as the user named it."""
        super().__init__(client, read_only=True)
        self.refused: set[str] = set()
        self._path, self._takes_suffixes, self._told = path, True, False

    async def get(  # noqa: D102 - as zarr has it
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            content = await self._part(key, byte_range) if byte_range else await self._bytes(key)
        except Exception as error:
            if not self._is_absent(key, error):
                raise
            return None
        return prototype.buffer.from_bytes(content)

    async def getsize(self, key: str) -> int:
        """Bytes of a file, from an answer to a request for its first one. Raises FileNotFoundError."""
        from obstore.exceptions import NotSupportedError

        try:
            try:
                answer = await self._ask(key, (0, 1))
            except NotSupportedError:
                answer = await self._ask(key)
        except Exception as error:
            if self._is_absent(key, error):
                raise FileNotFoundError(key) from error
            raise
        return int(answer.meta["size"])

    def _is_absent(self, key: str, error: Exception) -> bool:
        from obstore.exceptions import PermissionDeniedError

        refused = isinstance(error, PermissionDeniedError) and key.partition("/c/")[0] in PLANNED + CAPTURED
        if refused:
            self.refused.add(key)
        return refused or isinstance(error, FileNotFoundError)

    async def _part(self, key: str, wanted: ByteRequest) -> Any:
        from obstore.exceptions import NotSupportedError

        if isinstance(wanted, SuffixByteRequest):
            if self._takes_suffixes:
                try:
                    return await self._bytes(key, {"suffix": wanted.suffix})
                except NotSupportedError:  # Azure's has other ranges
                    self._takes_suffixes = False
            size = await self.getsize(key)
            wanted = RangeByteRequest(max(0, size - wanted.suffix), size)
        bounds: Any = {"offset": wanted.offset} if isinstance(wanted, OffsetByteRequest) else (wanted.start, wanted.end)
        try:
            return await self._bytes(key, bounds)
        except NotSupportedError:  # it sends the whole file
            whole = await self._whole(key)
        return whole[wanted.offset :] if isinstance(wanted, OffsetByteRequest) else whole[wanted.start : wanted.end]

    async def _whole(self, key: str) -> memoryview:
        answer = await self._ask(key)
        if (size := int(answer.meta["size"])) > _LARGEST_WHOLE_BYTES:
            raise StoreError(
                f"store.path: expected a server that sends parts of files (range requests) at {self._path}, found one "
                f"that sends only whole ones, and {key} has {size / 2**20:.0f} MiB; copy the store to a folder"
            )
        if not self._told:
            logger.warning("store: %s: its server sends no parts of files: whole ones are read", self._path)
            self._told = True
        return memoryview(await answer.bytes_async())

    async def _bytes(self, key: str, bounds: Any = None) -> Any:
        return await (await self._ask(key, bounds)).bytes_async()

    async def _ask(self, key: str, bounds: Any = None) -> Any:
        """The server's answer, whose content has not been read."""
        import obstore

        answer = await obstore.get_async(self.store, key, options={"range": bounds} if bounds else None)
        encoding = str(answer.attributes.get("Content-Encoding", "")).lower()
        if encoding in _COMPRESSED:
            raise StoreError(
                f"store.path: expected files as they are at {self._path}, found {key} compressed by its server "
                f"(Content-Encoding: {encoding})"
            )
        return answer
