"""Load the teacher's weights: whole, spread over a worker's devices, or this worker's share of them."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from distill.config.generate import ParallelConfig
from distill.errors import TeacherError, first_line
from distill.run.device import count_devices, free_bytes
from distill.run.grid import Grid
from distill.teacher import adapter
from distill.teacher.pipeline import Stage
from distill.teacher.placement import Needs, Placement, decide
from distill.teacher.share import Shard, Share
from distill.teacher.source import Source, auto_class

logger = logging.getLogger(__name__)


def load(
    source: Source, device: torch.device, placement: Placement, needs: Needs, max_memory: str | None, offload: Path
) -> tuple[Any, Share]:
    """The model in eval mode, and this worker's share of it.

    device: of this worker; with device_map the first of its devices. device_map puts at most `max_memory` on each; the
    rest stays in CPU memory, then on disk, in the folder `offload`.
    Raises TeacherError where transformers cannot load it, weights are missing, or the device's memory is too small.
    """
    loader = needs.model_class if needs.left_out else auto_class(source.model_config)
    share, is_split = Share(), placement.shard_size > 1
    kwargs: dict[str, Any] = {
        "dtype": needs.dtype,
        "trust_remote_code": source.config.trust_remote_code,
        "attn_implementation": source.config.attn_implementation,
    }
    if placement.mode in ("device_map", "tensor") and importlib.util.find_spec("accelerate") is None:
        raise TeacherError(f"parallel.mode={placement.mode} needs the package accelerate: pip install accelerate")
    if placement.mode == "device_map":
        limits = _max_memory(device, placement.shard_size, needs, max_memory)
        kwargs |= {"device_map": "auto", "max_memory": limits, "offload_folder": offload}
    elif placement.mode == "tensor" and is_split:
        from transformers.distributed import DistributedConfig

        if device.type == "cpu" and torch.cuda.is_available():
            raise TeacherError("parallel.mode=tensor on a CPU beside GPUs: hide them with CUDA_VISIBLE_DEVICES=")
        kwargs["distributed_config"] = DistributedConfig(tp_size=placement.shard_size, tp_plan=needs.tensor_plan)
        share = Shard(needs.vocab_size, device)
    elif placement.mode == "pipeline" and is_split:
        share = Stage(device)
        loader = share.model_class(needs.model_class)
    if loader is not auto_class(source.model_config):
        del kwargs["trust_remote_code"]
    if source.adapter is not None:
        kwargs |= adapter.UNMERGED
    if needs.left_out:
        logger.info("teacher: not loaded, since text does not need it: %s", ", ".join(needs.left_out))
    try:
        model, info = loader.from_pretrained(source.folder, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise TeacherError(
                f"teacher.model: expected all weights in {source.folder}, found {len(missing)} missing ({missing[0]})"
            )
        if source.adapter is not None:
            model = adapter.merge(model, source.adapter)
            logger.info("teacher: merged the adapter in %s into %s", source.adapter, source.folder)
        if placement.mode in ("data", "pipeline"):
            model = model.to(device)
    except TeacherError:
        raise
    except torch.OutOfMemoryError as error:
        raise TeacherError(f"teacher.model: {source.folder} does not fit into the memory of {device}") from error
    except Exception as error:
        raise TeacherError(f"teacher.model: cannot load {source.folder}: {first_line(error)}") from error
    places = [str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()]
    if offloaded := places.count("disk") + (places.count("cpu") if device.type == "cuda" else 0):
        logger.warning("teacher: %d of its %d parts are in memory or on disk, which is slow", offloaded, len(places))
    return model.eval(), share


def load_here(source: Source, needs: Needs, device: torch.device, offload: Path) -> tuple[Any, Share]:
    """The same outside a run: on as many of this machine's devices as the model needs. Raises ConfigError too."""
    devices = count_devices(source.config.device, device, 1)
    placement = decide(ParallelConfig(), needs, free_bytes(device, 1), Grid(), devices)
    return load(source, device, placement, needs, None, offload)


def _max_memory(device: torch.device, count: int, needs: Needs, limit: str | None) -> dict[int | str, int | str]:
    """The most memory for weights on each of `count` devices, beginning with `device`, in accelerate's form."""
    if device.type == "cpu":
        return {"cpu": limit or free_bytes(device, 1)}
    first = device.index
    free = {i: int(0.9 * torch.cuda.mem_get_info(i)[0]) - needs.activations for i in range(first, first + count)}
    return {**{i: limit or max(0, size) for i, size in free.items()}, "cpu": free_bytes(torch.device("cpu"), 1)}
