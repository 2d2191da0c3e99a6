"""The language model of a larger model: the towers of a multimodal model are left out before it is loaded.

A tower is an encoder of images, videos or sounds. Text never goes through one: the logits are the plain model's.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from distill.errors import TeacherError


def derived(base: type, cut: Callable[[Any], None]) -> type:
    """A subclass of a model's class that calls `cut` on each new instance, before any weight is loaded."""

    def init(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(model, config, *args, **kwargs)  # type: ignore[misc]
        cut(model)

    # transformers finds the renamings of a checkpoint's keys by the name and the module of the class.
    return type(
        base.__name__,
        (base,),
        {"__init__": init, "__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]},
    )


def outside(model: Any) -> dict[str, nn.Module]:
    """The outermost parts of a multimodal model that belong neither to its language model nor to its output head."""
    if model.config.get_text_config() is model.config or model.get_decoder() is model:
        return {}
    wanted = {model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()} - {None}
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and not _within(name, model, wanted) and wanted.isdisjoint(part.modules()):
            found[name] = part
    return found


def towers(model: Any) -> list[str]:
    """The names of the parts of `outside` that are models of their own. What joins them to text is small: it stays."""
    from transformers import PreTrainedModel

    return [name for name, part in outside(model).items() if isinstance(part, PreTrainedModel)]


def without_towers(base: type) -> type:
    """A subclass of a multimodal model's class that has no towers, and loads none."""
    return derived(base, lambda model: leave_out(model, towers(model)))


def leave_out(model: Any, names: Iterable[str]) -> None:
    """Replace these parts of a model by modules without weights."""
    names = list(names)
    for name in names:
        model.set_submodule(name, Absent(model.get_submodule(name)))

    def stays(weight: str) -> bool:
        return not any(weight.startswith(f"{name}.") for name in names)

    tied = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {new: old for new, old in tied.items() if stays(new) and stays(old)}
    model._tp_plan = {part: style for part, style in (getattr(model, "_tp_plan", None) or {}).items() if stays(part)}


def _within(name: str, model: Any, wanted: Iterable[nn.Module]) -> bool:
    """Whether the part of this name lies inside one of the `wanted`."""
    parts = name.split(".")
    return any(model.get_submodule(".".join(parts[:i])) in wanted for i in range(1, len(parts) + 1))


class Absent(nn.Module):
    """Replaces a part that is not loaded: it has no weights, but the plain attributes that models look at."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self._name = type(part).__name__
        for name, value in vars(part).items():
            if not name.startswith("_") and isinstance(value, int | str | float):
                setattr(self, name, value)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not to be run: raises TeacherError."""
        raise TeacherError(f"teacher.model: expected a model that reads text without its {self._name}, which it runs")
