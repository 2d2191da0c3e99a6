import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.teacher.model import Teacher
from tests.captured import topk
from tests.support import MODELS, build_model

CPU = torch.device("cpu")


def samples(*lengths):
    return [np.random.default_rng(i).integers(0, 1000, length).astype(np.int32) for i, length in enumerate(lengths)]


def together(teacher, batch):
    """The slices of a batch in one tensor."""
    return torch.cat([logits.clone() for logits in teacher.logits(batch)])


def plain(model, batch):
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.from_numpy(s.astype(np.int64))[None]).logits[0] for s in batch])


@pytest.mark.parametrize("name", MODELS)
def test_sliced_logits_equal_the_plain_forward(name):
    model, batch = build_model(name), samples(30, 17, 5)
    expected = plain(model, batch)
    teacher = Teacher(model, CPU)
    teacher._slice_tokens = 7
    found = together(teacher, batch)
    assert teacher._sliced
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_softcapped", "gpt2"])
def test_half_precision_models_give_float32_logits(name):
    """The head's product is not rounded to bfloat16: closer to the exact one than the model's own."""
    model = build_model(name).bfloat16()
    (batch,) = samples(40)
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.from_numpy(batch.astype(np.int64))[None]).last_hidden_state
        own = plain(model, [batch]).float()
        exact = copy.deepcopy(model)
        exact.set_output_embeddings(model.get_output_embeddings().float())
        logits = exact.get_output_embeddings()(hidden[0].float())
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = cap * torch.tanh(logits / cap) if cap else logits
    model = build_model(name).bfloat16()
    found = together(Teacher(model, CPU), [batch])
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    assert (found - logits).abs().max() < 0.1 * (own - logits).abs().max()


class Peak(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_a_whole_batch_never_exist():
    batch = samples(*[100] * 8)
    teacher = Teacher(build_model("llama"), CPU)
    teacher._slice_tokens = 50
    with Peak() as peak:
        rows = 0
        for logits in teacher.logits(batch):
            topk(logits, 8, [1.0, 2.0], torch.zeros(len(logits), dtype=torch.long))
            rows += len(logits)
    assert rows == 800
    assert 50 * 1000 <= peak.elements < 8 * 100 * 1000 / 4


def test_a_model_that_cannot_be_taken_apart_is_run_whole(caplog):
    """Its forward does something between backbone and head that hidden states alone do not carry."""
    model = build_model("llama")
    own = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, input_ids=None, **kwargs):
            output = own(self, input_ids=input_ids, **kwargs)
            output.logits = output.logits + input_ids[..., None].float()
            return output

    model.__class__ = Odd
    batch = samples(12, 30)
    expected = plain(model, batch)
    with caplog.at_level("WARNING"):
        teacher = Teacher(model, CPU)
    assert "one sample at a time" in caplog.text
    torch.testing.assert_close(together(teacher, batch), expected, atol=1e-5, rtol=1e-5)
