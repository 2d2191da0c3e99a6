"""Every model type that transformers calls a language model, built small: is its head run in slices, and exactly?

python -m tests.benchmarks.architectures            # all types; or the names of some

A line for each: the type, its class, the way (sliced: the fast path; whole: one sample at a time; refused), the largest
difference from the plain model's logits relative to the largest, and the reason. Each runs in a process of its own.
"""

import contextlib
import io
import logging
import multiprocessing
import resource
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

_GIB = 1 << 30
_SECONDS = 90
_DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"}
_DEPTHS |= {"num_decoder_layers", "num_encoder_layers", "global_layers", "num_mem_blocks"}
_EXPERTS = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"}
_SMALL: dict[str, Any] = {"intermediate_size": 128, "moe_intermediate_size": 32, "ffn_dim": 128, "d_ff": 128}
_SMALL |= {"mlp_dim": 128, "ffn_hidden_size": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "inner_dim": 128}
_SMALL |= {"n_inner": 128, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "dropout": 0.0}
_SMALL |= {"vocab_size_per_layer_input": 1000, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512}
_SMALL |= {"num_nextn_predict_layers": 0}
_SMALL |= {"first_k_dense_replace": 1}
_SMALL |= {"num_kv_shared_layers": 0, "num_dense_layers": 1, "num_experts_per_token": 2, "is_decoder": True}
_UNSET = {"head_dim": 16, "num_key_value_heads": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
_NARROW: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_NARROW |= {"n_embd": 64, "n_head": 4, "d_model": 64, "n_heads": 4, "num_heads": 4, "word_embed_proj_dim": 64}
_NARROW |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_NARROW |= {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "rotary_dim": 8, "embedding_size": 64}


def shrink(values: dict[str, Any], depth: int, narrow: bool) -> dict[str, Any]:
    """A configuration's values, small: few layers and experts, 1,000 ids, and narrow too if asked."""
    small: dict[str, Any] = {}
    layers = next((value for name, value in values.items() if name in _DEPTHS and isinstance(value, int)), 0)
    for name, value in values.items():
        if isinstance(value, dict) and "mrope_section" in value and narrow:
            width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
            bounds = [0, *np.cumsum(value["mrope_section"])]
            parts = np.diff([int(bound) * _NARROW["head_dim"] // width for bound in bounds])
            small[name] = {**value, "mrope_section": parts.tolist()}
        elif isinstance(value, dict) and name.endswith("config"):
            text = "vision" not in name and "audio" not in name
            small[name] = shrink(value, depth, narrow and text)
        elif isinstance(value, list) and len(value) == layers > 1:
            small[name] = [value[round(i * (layers - 1) / (depth - 1))] for i in range(depth)]
        elif name in _DEPTHS and isinstance(value, int):
            small[name] = depth
        elif name in _EXPERTS:
            small[name] = min(value or 4, 4)
        elif name in ("num_experts_per_tok", "moe_k", "top_k_experts"):
            small[name] = min(value or 2, 2)
        elif name == "rope_theta":
            small[name] = value or 1e4
        elif isinstance(value, dict) and "rope_theta" in value:
            small[name] = {**value, "rope_theta": value["rope_theta"] or 1e4}
        elif name == "vocab_size":
            small[name] = 1000
        elif name.endswith(("token_id", "token_index")):
            small[name] = value if value is None or (isinstance(value, int) and value < 1000) else 999
        elif name == "layer_types" and value is None:
            small[name] = ["full_attention"] * depth
        elif narrow and value is None and name in _UNSET:
            small[name] = _UNSET[name]
        elif name in _SMALL and value is not None:
            small[name] = _SMALL[name]
        elif narrow and name in _NARROW and isinstance(value, int):
            small[name] = min(value, _NARROW[name])
        else:
            small[name] = value
    return small


def changed(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """What differs in the small configuration, so that its class derives from it what else has to be."""
    found: dict[str, Any] = {}
    for name, value in small.items():
        if isinstance(value, dict) and name.endswith("config") and isinstance(values[name], dict):
            found[name] = changed(values[name], value)
        elif value != values[name] and not isinstance(value, list):
            found[name] = value
    return found | ({"model_type": values["model_type"]} if "model_type" in values else {})


def build(kind: str) -> Any:
    """A random small model of this type, or the error of the last try."""
    from transformers import CONFIG_MAPPING

    from distill.teacher.source import auto_class

    error: Exception | None = None
    values: dict[str, Any]
    sizes = [(2, True), (4, True), (6, True), (2, False), (8, False)]
    for depth, narrow, whole in [(*size, whole) for size in sizes for whole in (True, False)]:
        try:
            values = CONFIG_MAPPING[kind]().to_dict()
            small = shrink(values, depth, narrow)
            config = CONFIG_MAPPING[kind].from_dict(small if whole else changed(values, small))
            torch.manual_seed(0)
            model = auto_class(config).from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight) * 0.1) if weight.ndim == 1 else weight.mul_(3.0)
                model(input_ids=torch.arange(5, 40)[None], use_cache=False)
            return model
        except Exception as failure:
            error = failure
    raise error or AssertionError


def measure(kind: str) -> tuple[str, str, float, str]:
    """The class of a type, the way that it runs, its difference from the plain model, and the reason."""
    from distill.errors import TeacherError
    from distill.teacher.model import Teacher
    from distill.teacher.text import leave_out, towers

    try:
        model = build(kind)
    except Exception as error:
        return "-", "not built", float("nan"), f"{type(error).__name__}: {error}"
    rng = np.random.default_rng(0)
    samples = [rng.integers(3, 900, length).astype(np.int32) for length in (40, 37, 33, 9)]
    with torch.inference_mode():
        plain = [
            model(input_ids=torch.from_numpy(s.astype(np.int64))[None], use_cache=False).logits[0] for s in samples
        ]
    leave_out(model, towers(model))
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("distill").addHandler(handler)
    try:
        teacher = Teacher(model, torch.device("cpu"))
        found = torch.cat([logits.clone() for logits in teacher.logits(samples)])
    except TeacherError as error:
        return type(model).__name__, "refused", float("nan"), str(error)
    finally:
        logging.getLogger("distill").removeHandler(handler)
    expected = torch.cat(plain).float()
    finite = expected.isfinite()
    off = float((expected - found)[finite].abs().max() / expected[finite].abs().max())
    way = "sliced" if teacher._sliced else "whole"
    return type(model).__name__, way, off, said.getvalue().partition("slower: ")[2].strip()


def _child(kind: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (14 * _GIB, 14 * _GIB))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = measure(kind)
        except Exception as error:
            found = "-", "failed", float("nan"), f"{type(error).__name__}: {error}"
    answer.send(found)


def main(kinds: list[str]) -> None:
    """Print the table."""
    import transformers  # before the processes are forked
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = [
        *causal,
        *(kind for kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if kind not in causal),
    ]
    context = multiprocessing.get_context("fork")
    for kind in kinds or known:
        ours, its = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(kind, its))
        process.start()
        its.close()
        try:
            name, way, off, reason = ours.recv() if ours.poll(_SECONDS) else ("-", "too slow", float("nan"), "")
        except EOFError:
            name, way, off, reason = "-", "died", float("nan"), "out of memory"
        process.kill()
        process.join()
        print(f"{kind:24} {name:38} {way:9} {off:8.1e}  {' '.join(reason.split())[:200]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
