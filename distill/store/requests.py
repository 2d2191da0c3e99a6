"""Several requests of a zarr store at the same time: over a slow link they take as long as one."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

T = TypeVar("T")


def together(requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The answers to several requests, in their order."""

    async def gather() -> list[T]:
        return list(await asyncio.gather(*requests))

    return list(sync(gather()))


def contents(location: Any, keys: Iterable[str]) -> list[bytes | None]:
    """What is under several keys; None where there is nothing."""
    found = together(location.get(key, default_buffer_prototype()) for key in keys)
    return [None if content is None else content.to_bytes() for content in found]


def keys_below(location: Any, prefix: str) -> list[str]:
    """The keys below a prefix, without it: one listing."""

    async def collect() -> list[str]:
        return [key.removeprefix(f"{prefix}/") async for key in location.list_prefix(f"{prefix}/")]

    return list(sync(collect()))
