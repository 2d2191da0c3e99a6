"""The student: found, built from the teacher or another checkpoint, compared with a cache, and saved."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from distill.config.generate import TeacherConfig
from distill.config.train import StudentConfig
from distill.errors import ConfigError, TeacherError, first_line
from distill.student.loss import DistillationLoss
from distill.teacher import adapter
from distill.teacher.pipeline import decoder_layers
from distill.teacher.source import Source, auto_class, locate
from distill.teacher.text import outside

logger = logging.getLogger(__name__)


def find(config: StudentConfig, teacher: Mapping[str, Any], *others: Mapping[str, Any]) -> Source:
    """The folder, configuration and tokenizer of ``student.model``. Raises ConfigError where it cannot be found.

    teacher, others: the stores' attributes ``teacher``, which must be the same one where ``student.model`` is teacher
    """
    is_teacher = config.model == "teacher"
    names = dict.fromkeys((one["model"], one["revision"]) for one in (teacher, *others) if is_teacher)
    if len(names) > 1:
        shown = " and ".join(model if revision is None else f"{model} at {revision}" for model, revision in names)
        raise ConfigError(f"student.model: expected a folder or an id, since the stores' teachers are {shown}")
    settings = TeacherConfig(
        model=teacher["model"] if is_teacher else config.model,
        revision=teacher["revision"] if is_teacher else None,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    try:
        return locate(settings)
    except TeacherError as error:
        text = str(error).replace("teacher.model", f"student.model={config.model}", 1)
        raise ConfigError(text.replace("teacher.trust_remote_code", "student.trust_remote_code")) from error


def build(config: StudentConfig, source: Source, seed: int) -> Any:
    """The student, a transformers causal LM in float32 on the CPU: as it is, with fewer layers, or random.

    Of a multimodal model the language model is trained. All else is frozen, and saved as it was.
    Raises ConfigError where the weights cannot be loaded, or where it has fewer layers than should be kept.
    """
    torch.manual_seed(seed)
    loader = auto_class(source.model_config)
    kwargs = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
    kwargs |= {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if config.init == "random":
        settings = source.model_config
        if config.layers is not None:
            settings = _with_layers(settings, evenly_spaced(config.layers, settings))
        return _frozen_outside_text(loader.from_config(settings, **kwargs))
    kwargs |= adapter.UNMERGED if source.adapter is not None else {}
    try:
        model, info = loader.from_pretrained(source.folder, output_loading_info=True, **kwargs)
        if source.adapter is not None:
            model = adapter.merge(model, source.adapter)
    except TeacherError as error:
        raise ConfigError(str(error).replace("teacher.model", "student.model", 1)) from error
    except Exception as error:
        raise ConfigError(f"student.model: cannot load {source.folder}: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"student.model: expected all weights in {source.folder}, found {len(missing)} missing ({missing[0]})"
        )
    return _frozen_outside_text(
        model if config.layers is None else shortened(model, evenly_spaced(config.layers, model.config))
    )


def _frozen_outside_text(model: Any) -> Any:
    """`model`, in which what text does not go through takes no gradient: DDP expects one of every weight that does."""
    for part in outside(model).values():
        part.requires_grad_(False)
    return model


def evenly_spaced(layers: int, settings: Any) -> list[int]:
    """The numbers of `layers` evenly spaced layers, the first and the last among them."""
    there = int(settings.get_text_config().num_hidden_layers)
    if layers > there:
        raise ConfigError(f"student.layers: expected at most {there}, the model's layers, found {layers}")
    return [round(i * (there - 1) / max(1, layers - 1)) for i in range(layers)]


def _with_layers(settings: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration with these layers only."""
    settings = type(settings).from_dict(settings.to_dict())
    text = settings.get_text_config()
    if types := getattr(text, "layer_types", None):
        text.layer_types = [types[i] for i in kept]
    text.num_hidden_layers = len(kept)
    return settings


def shortened(model: Any, kept: Sequence[int]) -> Any:
    """A copy of `model` with only the layers whose numbers are in `kept`, in that order; other weights are the same."""
    found = decoder_layers(model)
    if found is None:
        raise ConfigError(f"student.layers: cannot tell which of {type(model).__name__}'s parts are its layers")
    prefix = found[0]
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.startswith(f"{prefix}."):
            old, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            weights |= {f"{prefix}.{new}.{rest}": weight for new, i in enumerate(kept) if i == int(old)}
        else:
            weights[name] = weight
    short = type(model)(_with_layers(model.config, kept))
    short.load_state_dict(weights)
    short.tie_weights()
    return short.train(model.training)


def check(source: Source, loss: DistillationLoss, cache: Any) -> None:
    """Raise ConfigError or StoreError where this student cannot learn from this cache, or from one that it mixes."""
    for part in cache.parts:
        try:
            _check(source, loss, part)
        except ConfigError as error:
            where = "" if len(cache.parts) == 1 or part.path in str(error) else f" ({part.path})"
            raise ConfigError(f"{error}{where}") from error
    sampled = [part.path for part in cache.parts if part.attributes["method"] == "sample"]
    without = [part.path for part in cache.parts if "tail_logprob" not in part.arrays]
    if sampled and without:
        loss.check_weights(f"{sampled[0]} of capture.method=sample", without[0])


def _check(source: Source, loss: DistillationLoss, cache: Any) -> None:
    """Raise ConfigError or StoreError where this student cannot learn from this cache of one store."""
    loss.check_method(cache.attributes["method"])
    loss.check(cache.temperatures)
    loss.check_arrays(cache.arrays, cache.path)
    if loss.divergence == "on_policy" and "loss_mask" not in cache.arrays:
        logger.warning(
            "%s has no loss mask: with on_policy every token of it counts as one that the student wrote; expected a "
            "store of its rollouts (distill.rollout)",
            cache.path,
        )
    cache.check_tokenizer(source.tokenizer)
    known = int(cache.attributes["tokenizer"]["vocab_size"])
    if source.vocab_size < known:
        raise ConfigError(
            f"student.model: expected a softmax over at least {known:,} ids, the tokenizer's, found "
            f"{source.vocab_size:,} (the teacher's {cache.attributes['vocab_size']:,} may be padded beyond the "
            "tokenizer's, a student's may not be smaller)"
        )
    context = source.context_length
    if context is not None and cache.max_length > context:
        raise ConfigError(
            f"student.model: expected a context of at least {cache.max_length} tokens, the longest sample of "
            f"{cache.path}, found {context}"
        )


def save(module: nn.Module, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the student and its tokenizer, as from_pretrained reads them: all workers together; worker 0 writes.

    module: what `model` was wrapped in; its weights may be sharded.
    """
    weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def is_saved(folder: Path) -> bool:
    """Whether `save` was done."""
    try:
        json.loads((folder / "tokenizer_config.json").read_text())  # the last file that it writes
    except (OSError, ValueError):  # empty, where the disk was full
        return False
    return True
