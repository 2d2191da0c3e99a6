"""The device that a worker computes on, and its free memory."""

import logging
from pathlib import Path

import torch

from distill.errors import ConfigError

logger = logging.getLogger(__name__)


def pick_device(key: str, wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this worker, which becomes torch's current one. key: the name of the setting with value `wanted`.

    With auto, several workers may share a GPU; with cuda, each worker has its own. On a CPU each worker computes in one
    thread, since a sum over another number of threads differs in its last bits.
    Raises ConfigError where there is no such device, or fewer GPUs than workers.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)
        return torch.device("cpu")
    kind, _, index = wanted.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"{key}: expected auto, cpu, cuda or cuda:N, found {wanted}")
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}: expected a CUDA GPU for {wanted}, found none (torch {torch.__version__})")
    count = torch.cuda.device_count()
    if index and local_world_size > 1:
        raise ConfigError(f"{key}: {wanted} serves one worker, found {local_world_size} on this node; use cuda")
    if (kind == "cuda" and local_world_size > count) or int(index or 0) >= count:
        raise ConfigError(
            f"{key}={wanted}: expected a GPU for each of the node's {local_world_size} workers, found {count}"
        )
    if local_world_size > count:
        logger.warning("%d workers share %d GPU(s)", local_world_size, count)
    device = torch.device("cuda", int(index) if index else local_rank % count)
    torch.cuda.set_device(device)
    return device


def first_device(device: torch.device, local_rank: int, each: int) -> torch.device:
    """The first GPU of a worker that has `each` of them; it becomes torch's current one. A CPU is returned as it is."""
    if device.type == "cuda":
        device = torch.device("cuda", local_rank * each)
        torch.cuda.set_device(device)
    return device


def count_devices(wanted: str, device: torch.device, local_world_size: int) -> int:
    """How many devices this node's workers may use: all GPUs; one for cuda:N; on a CPU, one for each worker."""
    if device.type != "cuda":
        return local_world_size
    return 1 if ":" in wanted else torch.cuda.device_count()


def free_bytes(device: torch.device, local_world_size: int) -> int:
    """The free bytes of this worker's GPU, or of the machine; divided by the number of workers that share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // -(-local_world_size // torch.cuda.device_count())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return 1 << 62
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(found.split()[1]) * 1024 // local_world_size
