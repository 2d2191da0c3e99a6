"""Where a language model is taken apart: its backbone, from ids to hidden states, and its output head, in float32.

B batch, T positions, H hidden size, V vocabulary, n rows.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def backbones(model: Any) -> list[nn.Module]:
    """What may be the backbone, outermost first: the parts that hold the input embedding and not the output head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return []
    return [
        part
        for part in model.modules()
        if part is not embedding and embedding in (inside := set(part.modules())) and head not in inside
    ]


class BackboneEnd(Exception):  # noqa: N818
    """Ends a forward pass behind the backbone. output: what the backbone returned; its first item is [B, T, H]."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Backbone:
    """A part of a model whose forward either ends the model's forward pass, or is skipped and returns what it is told.

    The part itself stays in its place, since models look at attributes of it.
    """

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._output: Any = None
        self._replayed: Any = None
        self._wrapped = vars(part).get("forward")  # accelerate's, if it has put its own there
        own = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._replayed is not None:
                return self._replayed
            raise BackboneEnd(own(*args, **kwargs))

        part.forward = forward

    def release(self) -> None:
        """Give the part its own forward back."""
        del self._part.forward
        if self._wrapped is not None:
            self._part.forward = self._wrapped

    def keep(self, output: Any) -> Tensor:
        """Keep what the backbone returned, whose other items each slice needs as well; returns its hidden states."""
        self._output = output
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden

    @contextlib.contextmanager
    def returns(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the part returns its latest output with `hidden` [1, n, H] for its hidden states."""
        if isinstance(self._output, Tensor):
            self._replayed = hidden
        elif isinstance(self._output, tuple):
            self._replayed = (hidden, *self._output[1:])
        else:
            self._replayed = copy.copy(self._output)
            self._replayed[next(iter(self._replayed))] = hidden
        try:
            yield
        finally:
            self._replayed = None


class Float32Head(nn.Module):
    """The output head, with float32 results for any dtype of its weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = _resident(head)
        on_gpu = self.weight.device.type == "cuda"
        self._mixed = on_gpu and self.weight.dtype != torch.float32
        self._weight32 = self.weight if on_gpu else self.weight.float()  # CPU products have no mixed precision: a copy
        # Reused on a CPU: there the new memory pages of a new tensor cost up to a tenth of the product's time.
        self._buffer = None if on_gpu else torch.empty(0, len(self.weight))

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, n, H] -> [1, n, V] float32."""
        hidden = hidden[0].to(self.weight.device)
        if self._mixed:
            logits = torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        elif self._buffer is None:
            logits = torch.mm(hidden.float(), self._weight32.t())
        else:
            if len(self._buffer) < len(hidden):
                self._buffer = hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32)
            logits = torch.mm(hidden.float(), self._weight32.t(), out=self._buffer[: len(hidden)])
        return (logits if self.bias is None else logits.add_(self.bias.float()))[None]


def _resident(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias as plain tensors: this worker's shard, or read from where they are offloaded."""
    if head.weight.is_meta:  # offloaded by accelerate; we keep the head here, since every slice needs it
        from accelerate.utils import align_module_device

        with align_module_device(head):
            return head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    # Asked by name: importing DTensor takes every worker a second.
    local = [part.to_local() if hasattr(part, "to_local") else part for part in (head.weight, head.bias)]
    return local[0], local[1]
