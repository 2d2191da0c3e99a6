"""Large arrays that the processes of a DataLoader share instead of copying."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SMALLEST_FILE = 1 << 20

T = TypeVar("T", bound=np.generic)


class SharedArray(Generic[T]):
    """An array of one axis that a child process maps, however it is started: fork, forkserver or spawn.

    values: [n], read-only

    The values are in a file without a name: in memory, or where the system has no such files, on the disk. It needs no
    room in /dev/shm, which is small in containers. A process that is being started inherits the file's descriptor; any
    other pickle holds the values. Less than 1 MiB has no file and is copied, since descriptors are few.
    """

    def __init__(self, parts: Iterable[NDArray[Any]], dtype: DTypeLike) -> None:
        """The values of all parts, one after the other: no more than one of them is in this process's own memory."""
        descriptor = _nameless_file()
        with open(descriptor, "wb", closefd=False) as file:
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).data)
        self._map(descriptor, np.dtype(dtype))

    def _map(self, descriptor: int, dtype: np.dtype[Any]) -> None:
        size = os.fstat(descriptor).st_size
        closed = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor if size >= _SMALLEST_FILE else None
        if self._descriptor is None:
            content: Any = os.pread(descriptor, size, 0)
            closed()
        else:
            content = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        self.values: NDArray[T] = np.frombuffer(content, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._descriptor is not None and get_spawning_popen() is not None:
            return _inherited, (DupFd(self._descriptor), self.values.dtype)
        return SharedArray, ([np.array(self.values)], self.values.dtype)


def _inherited(descriptor: Any, dtype: np.dtype[Any]) -> SharedArray[Any]:
    """The array of the parent process, in a process that has just started."""
    array: SharedArray[Any] = object.__new__(SharedArray)
    array._map(descriptor.detach(), dtype)
    return array


def _nameless_file() -> int:
    """The descriptor of a new file that is gone when nobody has it open."""
    try:
        return os.memfd_create("distill samples")
    except (AttributeError, OSError):  # not Linux, or a kernel or a sandbox without it
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
