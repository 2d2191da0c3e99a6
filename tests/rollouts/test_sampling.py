"""The student writes: as its own distribution says, whatever a checkpoint's settings and its neighbours are."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.config.rollout import RolloutConfig
from distill.errors import ConfigError, NumericalError
from distill.rollouts import prepare
from distill.rollouts.draws import log_distribution
from distill.rollouts.sampling import Rollout, Sampler, stop_ids
from distill.settings import load
from tests.rollouts.support import sampler_of
from tests.support import save_model

PROMPTS = [np.arange(10, 10 + length, dtype=np.int32) for length in (3, 9, 5, 9, 1)]
NUMBERS = [(7, 0), (8, 0), (9, 0), (9, 1), (2**33, 0)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose softmax has 38 ids more than its tokenizer; one in 50 tokens is </s>."""
    return save_model("llama", tmp_path_factory.mktemp("models") / "student", chat=True, vocab_size=300)


def write(
    sampler: Sampler, prompts: list[NDArray[np.int32]] = PROMPTS, numbers: list[tuple[int, int]] = NUMBERS
) -> list[Rollout]:
    return sampler.write(prompts, numbers, lambda written, over: None)


def expect_equal(found: list[Rollout], expected: list[Rollout]) -> None:
    assert [rollout.ids.tolist() for rollout in found] == [rollout.ids.tolist() for rollout in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert one.finished == other.finished


def by_a_forward(
    model: Any, prompt: NDArray[np.int32], rollout: Rollout, temperature: float = 1.0, top_p: float = 1.0
) -> NDArray[np.float32]:
    """The log-probabilities of a rollout's ids, by one forward pass over prompt and rollout."""
    ids = torch.from_numpy(np.concatenate([prompt, rollout.ids]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits[:, 262:] = -torch.inf
    found = log_distribution(logits, temperature, top_p).gather(1, ids[len(prompt) :, None])[:, 0]
    return np.asarray(found.numpy())


@pytest.mark.parametrize("settings", [(), ("sampling.temperature=0.7", "sampling.top_p=0.9")])
def test_what_is_recorded_is_what_a_plain_forward_says(student: Path, settings: tuple[str, ...]) -> None:
    sampler = sampler_of(student, "sampling.max_new_tokens=60", *settings)
    temperature, top_p = (0.7, 0.9) if settings else (1.0, 1.0)
    ends = 0
    for prompt, rollout in zip(PROMPTS, write(sampler), strict=True):
        expected = by_a_forward(sampler._model, prompt, rollout, temperature, top_p)
        assert np.allclose(rollout.logprobs, expected, atol=1e-4)
        assert rollout.ids.max() < 262, "an id that the tokenizer lacks"
        assert (rollout.ids[:-1] != 2).all()
        assert rollout.finished == (rollout.ids[-1] == 2)
        assert rollout.finished or len(rollout.ids) == 60
        ends += rollout.finished
    assert 0 < ends < len(PROMPTS), "choose another seed: rollouts of both kinds are to be looked at"


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "longrope", "gemma3", "qwen3_vl"])
def test_other_models(name: str, tmp_path: Path) -> None:
    sampler = sampler_of(save_model(name, tmp_path / name), "sampling.max_new_tokens=12")
    assert sampler.even == (name == "longrope")
    for batch in sampler.batches([len(prompt) for prompt in PROMPTS]):
        found = write(sampler, [PROMPTS[i] for i in batch], [NUMBERS[i] for i in batch])
        for i, rollout in zip(batch, found, strict=True):
            assert np.allclose(rollout.logprobs, by_a_forward(sampler._model, PROMPTS[i], rollout), atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_an_adapter_is_merged(student: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    from tests.teacher.test_adapter import save_adapter  # skips without peft

    adapter = save_adapter(student, tmp_path / "adapter")
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter)
    for prompt, rollout in zip(PROMPTS, write(sampler_of(adapter, "sampling.max_new_tokens=8")), strict=True):
        assert np.allclose(rollout.logprobs, by_a_forward(adapted, prompt, rollout), atol=1e-3)


def test_neighbours_and_random_state_change_nothing(student: Path) -> None:
    sampler = sampler_of(student, "sampling.max_new_tokens=40")
    together = write(sampler)
    torch.manual_seed(1234)
    alone = [write(sampler, [prompt], [number])[0] for prompt, number in zip(PROMPTS, NUMBERS, strict=True)]
    expect_equal(alone, together)
    shorter = sampler_of(student, "sampling.max_new_tokens=8")
    expect_equal(write(shorter), [
        Rollout(one.ids[:8], one.logprobs[:8], one.finished and len(one.ids) <= 8) for one in together
    ])  # fmt: skip
    assert together[1].ids.tolist() != write(sampler, [PROMPTS[1]], [(8, 1)])[0].ids.tolist(), "another sample"
    seeded = sampler_of(student, "sampling.seed=1", "sampling.max_new_tokens=40")
    assert together[1].ids.tolist() != write(seeded)[1].ids.tolist(), "another seed"


def changed(student: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a student with these generation settings."""
    shutil.copytree(student, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_a_checkpoints_generation_settings_have_no_say(student: Path, tmp_path: Path) -> None:
    traps = {
        "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1, "suppress_tokens": list(range(10, 200)), "begin_suppress_tokens": [5, 6],
        "forced_bos_token_id": 9, "forced_eos_token_id": 2, "min_new_tokens": 30, "max_new_tokens": 3,
        "exponential_decay_length_penalty": [1, 2.0], "bad_words_ids": [[7]], "use_cache": False, "num_beams": 2,
        "num_return_sequences": 2, "max_length": 7, "guidance_scale": 3.0, "eos_token_id": [2],
    }  # fmt: skip
    trapped = changed(student, tmp_path / "trapped", **traps)
    expect_equal(write(sampler_of(trapped)), write(sampler_of(student)))


def test_stop_tokens(student: Path, tmp_path: Path) -> None:
    source = prepare.find(load(RolloutConfig, [f"student.model={student}"]))
    assert stop_ids(source, []) == [2]
    assert stop_ids(source, ["<|end|>", 9, "a"]) == [2, 5, 9, source.tokenizer("a")["input_ids"][0]]
    for bad, said in (("ab", "texts of one token, found 'ab' of 2"), (300, "ids below 300, found 300")):
        with pytest.raises(ConfigError, match=said):
            stop_ids(source, [bad])
    several = changed(student, tmp_path / "several", eos_token_id=[5, 77])
    assert stop_ids(prepare.find(load(RolloutConfig, [f"student.model={several}"])), []) == [2, 5, 77]
    whole = write(sampler_of(student, "sampling.max_new_tokens=40"))
    chosen = int(whole[1].ids[6])
    first = whole[1].ids.tolist().index(chosen)
    for found in (
        write(sampler_of(student, "sampling.max_new_tokens=40", f"sampling.stop=[{chosen}]"))[1],
        write(sampler_of(changed(student, tmp_path / "listed", eos_token_id=[chosen])))[1],
    ):
        assert found.ids.tolist() == whole[1].ids[: first + 1].tolist()
        assert found.finished


def test_padding_that_is_a_stop_token(student: Path, tmp_path: Path) -> None:
    """Many tokenizers pad with the token that ends a text: rollouts are cut at the one that they wrote."""
    from transformers import AutoTokenizer

    padded = tmp_path / "padded"
    shutil.copytree(student, padded)
    tokenizer = AutoTokenizer.from_pretrained(padded)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(padded)
    sampler = sampler_of(padded, "sampling.max_new_tokens=60")
    assert sampler._pad == 2
    expect_equal(write(sampler), write(sampler_of(student, "sampling.max_new_tokens=60")))


def test_the_context_limits_what_is_written(tmp_path: Path) -> None:
    sampler = sampler_of(save_model("opt", tmp_path / "x", max_position_embeddings=32), "sampling.max_new_tokens=20")
    assert sampler.batches([31, 4, 12, 31, 13, 25, 5]) == [[0, 3], [5], [4], [2, 6, 1]]
    long = [np.arange(10, 10 + length, dtype=np.int32) for length in (31, 31)]
    found = write(sampler, long, [(0, 0), (1, 0)])
    assert [len(rollout.ids) for rollout in found] == [1, 1]
    assert not any(rollout.finished for rollout in found if rollout.ids[-1] != 2)


def test_a_model_that_knows_no_padding_is_found_out(
    student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(sampler_of(student))
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = kwargs["position_ids"] = None
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with caplog.at_level("INFO"):
        sampler = sampler_of(student)
    assert sampler.even
    assert "batches have prompts of equal length" in caplog.text
    assert sampler.batches([3, 9, 5, 9, 1]) == [[1, 3], [2], [0], [4]]
    found: dict[int, Rollout] = {}
    for batch in sampler.batches([len(prompt) for prompt in PROMPTS]):
        some = write(sampler, [PROMPTS[i] for i in batch], [NUMBERS[i] for i in batch])
        found |= dict(zip(batch, some, strict=True))
    expect_equal([found[i] for i in range(len(PROMPTS))], expected)


def test_logits_that_are_nan_name_the_prompt(student: Path) -> None:
    sampler = sampler_of(student, "sampling.max_new_tokens=4")
    with torch.no_grad():
        sampler._model.model.embed_tokens.weight[18] = torch.nan  # in the second and the fourth prompt
    with pytest.raises(NumericalError, match="NaN or infinite at token 0 of rollout 0 of prompt 8; expected finite"):
        write(sampler)
