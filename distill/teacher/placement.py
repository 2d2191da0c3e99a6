"""How the teacher is spread: the way, and the number of devices of a replica. Decided by arithmetic, before loading.

Each of a replica's S devices needs about P * 1.1 / S bytes for P bytes of parameters, and the activations of one
forward pass: all of them, since every device holds all hidden states. That should fit into 0.9 of its free memory.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.config.generate import ParallelConfig
from distill.errors import ConfigError, TeacherError
from distill.run.grid import Grid
from distill.teacher.pipeline import decoder_layers
from distill.teacher.source import Source, auto_class
from distill.teacher.text import leave_out, towers, without_towers

_OVERHEAD, _USABLE = 1.1, 0.9
_GIB = 1 << 30


@dataclass(frozen=True)
class Placement:
    """How the teacher is spread.

    mode:       data, device_map, tensor or pipeline
    shard_size: devices of one replica
    """

    mode: str = "data"
    shard_size: int = 1

    @property
    def workers(self) -> int:
        """How many workers share one replica."""
        return self.shard_size if self.mode in ("tensor", "pipeline") else 1

    def describe(self, grid: Grid) -> str:
        """In words: "tensor, 4 replicas of 2 workers". grid: of all workers."""
        replicas = grid.world_size // self.workers
        devices = f" with {self.shard_size} devices" if self.mode == "device_map" else ""
        return f"{self.mode}, {_count(replicas, 'replica')} of {_count(self.workers, 'worker')}{devices}"


@dataclass(frozen=True)
class Needs:
    """What a teacher needs, found from its configuration and the sizes of its files alone.

    parameters, activations: bytes of the weights, and of one forward pass of batch.max_tokens
    heads:                   the numbers of attention heads and of key-value heads
    dtype:                   of the weights
    tensor_plan:             module -> how tensor parallelism splits it; empty where the model has no plan
    model_class:             the class that loads the language model, made from transformers' class of the model
    left_out:                the parts of a multimodal model that are not loaded: its towers
    quantization:            the method of a quantised checkpoint
    adapted:                 whether an adapter is to be merged into the weights
    """

    architecture: str
    parameters: int
    activations: int
    layers: int
    heads: tuple[int, int]
    vocab_size: int
    dtype: torch.dtype = torch.float32
    tensor_plan: dict[str, str] = field(default_factory=dict)
    model_class: Any = None
    left_out: list[str] = field(default_factory=list)
    quantization: str | None = None
    adapted: bool = False

    @classmethod
    def of(cls, source: Source, dtype: torch.dtype, max_tokens: int, slice_bytes: int) -> "Needs":
        """Look at the model without its weights. slice_bytes: of the logits that are held at a time."""
        text, model, found = source.text_config, None, None
        left_out: list[str] = []
        kept_class, unread = None, 0
        with contextlib.suppress(Exception):  # a model's own code may want its weights; then the model is not split
            with torch.device("meta"):
                model = auto_class(source.model_config).from_config(
                    source.model_config, dtype=dtype, trust_remote_code=source.config.trust_remote_code
                )
            whole = _bytes(model, dtype)
            left_out, kept_class = towers(model), type(model)
            if left_out:
                leave_out(model, left_out)
                kept_class = without_towers(kept_class)
            unread = whole - _bytes(model, dtype)
            found = decoder_layers(model)
        quantization = getattr(source.model_config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        hidden = _number(text, "hidden_size", 4096)
        wide = max(
            _number(text, "intermediate_size", 4 * hidden),
            _number(text, "num_experts_per_tok", 0)
            * _number(text, "moe_intermediate_size", _number(text, "intermediate_size", 0)),
        )
        heads = _number(text, "num_attention_heads", 1)
        return cls(
            architecture=(source.model_config.architectures or [type(model).__name__])[0],
            parameters=sum(file.stat().st_size for file in source.weight_files) - unread
            if quantization or model is None
            else _bytes(model, dtype),
            activations=max_tokens * 3 * (wide + hidden) * dtype.itemsize + 2 * slice_bytes,
            layers=len(found[1]) if found else 0,
            heads=(heads, _number(text, "num_key_value_heads", heads)),
            vocab_size=source.vocab_size,
            dtype=dtype,
            tensor_plan=_tensor_plan(model) if model is not None else {},
            model_class=kept_class,
            left_out=left_out,
            quantization=str(quantization.get("quant_method", "unknown")) if quantization else None,
            adapted=source.adapter is not None,
        )

    @property
    def dtype_name(self) -> str:
        """float32, bfloat16, ..."""
        return str(self.dtype).removeprefix("torch.")

    def per_device(self, shard_size: int) -> float:
        """The bytes that a replica on `shard_size` devices needs of each."""
        return self.parameters * _OVERHEAD / shard_size + self.activations

    def refusal(self, mode: str, shard_size: int) -> str | None:
        """Why the model cannot be split this way (mode: tensor or pipeline); None if it can."""
        if shard_size == 1:
            return None
        if self.quantization:
            return f"the checkpoint is quantised ({self.quantization}), which data and device_map can load"
        if self.adapted:
            return (
                "an adapter is merged where the whole model is loaded, with data or device_map; or merge it once "
                "(peft's merge_and_unload, save_pretrained) and give that folder"
            )
        if mode == "pipeline":
            if self.layers == 0:
                return f"it is not clear which parts of {self.architecture} are its layers"
            return f"expected at least {shard_size} layers, found {self.layers}" if self.layers < shard_size else None
        if not self.tensor_plan:
            return f"{self.architecture} has no plan for tensor parallelism in transformers; pipeline needs none"
        for name, number in zip(("attention heads", "key-value heads"), self.heads, strict=True):
            if number % shard_size:
                return f"expected {name} that {shard_size} divides, found {number}; pipeline splits layers instead"
        return None


def decide(config: ParallelConfig, needs: Needs, free: int, grid: Grid, devices: int) -> Placement:
    """The placement that the configuration asks for or, where it says auto, the one of fewest devices that fits.

    free: bytes of a device that its worker may use. devices: of this node, for all its workers.
    Raises ConfigError for what cannot be, and TeacherError where the teacher does not fit, with the arithmetic.
    """
    candidates = _candidates(config, grid, devices)
    problems = [_problem(placement, needs, grid, devices) for placement in candidates]
    possible = [placement for placement, problem in zip(candidates, problems, strict=True) if problem is None]
    if not possible:
        raise ConfigError(problems[0] or "")
    if config.mode != "auto" and len(candidates) == 1:  # the user may know better than an estimate
        placement = possible[0]
        if placement.mode == "device_map" or needs.parameters / placement.shard_size <= free:
            return placement
    for placement in possible:
        if needs.per_device(placement.shard_size) <= _USABLE * free:
            return placement
    raise TeacherError(
        f"teacher.model does not fit: {arithmetic(needs, free, possible[-1])}; try a smaller batch.max_tokens, more "
        "devices, parallel.mode=device_map, which offloads, or another mode by name, if you know that it fits"
    )


def arithmetic(needs: Needs, free: int, placement: Placement) -> str:
    """What a device needs and has, in words."""
    return (
        f"{needs.parameters / _GIB:.1f} GiB of parameters x {_OVERHEAD} / {placement.shard_size} + "
        f"{needs.activations / _GIB:.1f} of activations = {needs.per_device(placement.shard_size) / _GIB:.1f} GiB a "
        f"device, of {_USABLE} x {free / _GIB:.1f} GiB free"
    )


def _candidates(config: ParallelConfig, grid: Grid, devices: int) -> list[Placement]:
    """What the configuration leaves open, in order of preference: fewest devices first, then tensor before pipeline."""
    node, mode, size = grid.local_world_size, config.mode, config.shard_size
    own = devices // node
    sizes = [size] if isinstance(size, int) else [s for s in range(2, node + 1) if node % s == 0] or [2]
    if mode == "data" or (mode == "auto" and size == 1):
        return [Placement()]
    if mode == "device_map":
        return [Placement(mode, size if isinstance(size, int) else max(1, own))]
    if mode != "auto":
        return [Placement(mode, s) for s in sizes]
    shared = [Placement(way, s) for s in sizes for way in ("tensor", "pipeline")]
    if isinstance(size, int):
        return [Placement("device_map", size), *shared] if own >= size else shared
    return [Placement(), *(Placement("device_map", s) for s in range(2, own + 1)), *shared]


def _problem(placement: Placement, needs: Needs, grid: Grid, devices: int) -> str | None:
    """Why this teacher cannot be spread this way over these workers and devices; None if it can."""
    node, mode, size = grid.local_world_size, placement.mode, placement.shard_size
    what = f"parallel.mode={mode}, shard_size {size}"
    if mode == "data":
        return None
    if mode == "device_map":
        if node * size <= devices:
            return None
        return f"{what}: {node} workers x {size} devices = {node * size}, found {devices}: start fewer workers"
    try:
        grid.sharded(size)
    except ConfigError as error:
        return str(error)
    if size > 1 and node > devices:
        return f"{what}: expected a device for each of the node's {node} workers, found {devices}"
    refusal = needs.refusal(mode, size)
    return refusal and f"{what}: {refusal}"


def _tensor_plan(model: Any) -> dict[str, str]:
    """The model's own plan with its output head left in shards of the vocabulary; empty where it has none."""
    names = {part: name for name, part in model.named_modules()}
    head, embedding = names.get(model.get_output_embeddings()), names.get(model.get_input_embeddings())
    plan = {name: style for name, style in (getattr(model, "_tp_plan", None) or {}).items() if name != head}
    if not plan or head is None or embedding is None:
        return {}
    return {embedding: "embedding_rowwise", **plan, head: "colwise"}


def _bytes(model: Any, dtype: torch.dtype) -> int:
    return sum(weight.numel() * dtype.itemsize for weight in model.parameters())


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return int(value) if isinstance(value, int) else default


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
