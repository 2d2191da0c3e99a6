"""Pipeline parallelism, forward only: each worker of a replica holds consecutive layers of the teacher, its stage.

B batch, T positions (padded), H hidden size.

Every stage is an instance of a subclass of the model's own class. The layers of other stages are replaced before any
weight is loaded, so that only the stage's own weights are read. All stages go through the same batches in the same
order: while a stage works on one batch, the next stage works on the batch before. The results are equal to those of one
process, to the last bit.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.errors import TeacherError
from distill.teacher.share import GroupShare
from distill.teacher.text import Absent, derived, outside

logger = logging.getLogger(__name__)


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The name of the list of decoder layers, and the list itself; None where it is not clear which list that is."""
    number = int(model.config.get_text_config().num_hidden_layers)
    aside = tuple(f"{name}." for name in outside(model))
    parts = [(name, part) for name, part in model.named_modules() if not name.startswith(aside)]
    lists = {name: part for name, part in parts if isinstance(part, nn.ModuleList)}
    outer = {n: p for n, p in lists.items() if not any(n.startswith(f"{other}.") for other in lists if other != n)}
    found = [(name, part) for name, part in outer.items() if len(part) == number]
    return found[0] if len(found) == 1 else None


def balance(costs: Sequence[int], stages: int) -> list[int]:
    """Cut a list of costs into `stages` runs so that the largest sum of a run is least; returns stages + 1 bounds.

    Among equal solutions, bounds are as early as possible. No run is empty: expects at least `stages` costs.
    """
    totals = [0, *itertools.accumulate(costs)]
    best: list[tuple[int, list[int]]] = [(totals[i], [0, i]) for i in range(len(totals))]  # of the first i costs
    for stage in range(2, stages + 1):
        best = [
            min(
                ((max(best[cut][0], totals[i] - totals[cut]), [*best[cut][1], i]) for cut in range(stage - 1, i)),
                default=(totals[-1] + 1, []),
            )
            for i in range(len(totals))
        ]
    return best[-1][1]


class Stage(GroupShare):
    """One stage of the pipeline. It receives hidden states from the stage before, and sends them to the next."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.first, self.captures = self.rank == 0, self.rank == self.size - 1
        self._hidden: Tensor | None = None  # what came from the stage before, until the first layer takes it
        self._sent: tuple[Any, Tensor] | None = None

    def model_class(self, base: type) -> type:
        """A subclass of the model's class `base` that keeps only this stage's layers."""
        return derived(base, self._cut)

    def _cut(self, model: Any) -> None:
        """Replace the layers of other stages by modules without weights. Layers keep their numbers."""
        found = decoder_layers(model)
        if found is None:
            name = type(model).__name__
            raise TeacherError(f"parallel.mode=pipeline: it is not clear which parts of {name} are its layers")
        layers = found[1]
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = next(name for name, part in model.named_modules() if part is head)
        tied = any(weight.startswith(f"{name}.") for weight in model.all_tied_weights_keys)
        costs = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        costs[0] += embedding.weight.numel()
        costs[-1] += head.weight.numel()
        bounds = balance(costs, self.size)
        begin, end = bounds[self.rank : self.rank + 2]
        self.layers = range(begin, end)
        logger.info(
            "stage %d of %d: layers %d to %d of %d", self.rank, self.size, begin, end - 1, len(layers),
            extra={"console": False},
        )  # fmt: skip
        for i in range(len(layers)):
            if i not in self.layers:
                layers[i] = _Elsewhere(layers[i])
        if not self.captures:
            model.set_submodule(name, nn.Identity())
            model.all_tied_weights_keys = {}
            layers[end].register_forward_pre_hook(self._stop, with_kwargs=True)
        if not self.first:
            if not (tied and self.captures):
                model.set_input_embeddings(_Unembedded(embedding.weight.shape[1], embedding.weight.dtype))
            layers[begin].register_forward_pre_hook(self._take, with_kwargs=True)

    def run(self, module: Any, ids: Tensor) -> Any:
        """The output on the last stage; None on the others, which send their hidden states on."""
        text_config = module.config.get_text_config()
        if not self.first:
            self._hidden = torch.empty(*ids.shape, text_config.hidden_size, dtype=module.dtype, device=self.device)
            dist.recv(self._hidden, self.rank - 1)
        try:
            return module(input_ids=ids, use_cache=False)
        except _StageEnd as stopped:
            self._send(stopped.hidden)
            return None

    def _send(self, hidden: Tensor) -> None:
        """Send hidden states [B, T, H] to the next stage. At most one batch waits to be received."""
        self.flush()
        hidden = hidden.contiguous()
        self._sent = dist.isend(hidden, self.rank + 1), hidden  # kept until it has arrived

    def flush(self) -> None:
        """Wait until the next stage has received everything."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None

    def _take(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the first layer of this stage the hidden states of the stage before."""
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}

    def _stop(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End the forward pass: the layer after this stage's last one belongs to the next stage."""
        raise _StageEnd(args[0] if args else kwargs["hidden_states"])


class _StageEnd(Exception):  # noqa: N818
    """Ends the forward pass of a stage that is not the last. hidden: [B, T, H], the input of the next stage."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Elsewhere(Absent):
    """Replaces a layer of another stage."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What it was given: the layer is not there."""
        return hidden_states


class _Unembedded(nn.Module):
    """Replaces the input embedding on later stages, whose first layer gets its hidden states from the stage before."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size, self._dtype = hidden_size, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> zeros [B, T, H]."""
        return torch.zeros(*ids.shape, self._hidden_size, dtype=self._dtype, device=ids.device)
