"""What becomes of every form of data, in tokens and mask: «what is trained on» is shown by its marks."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from distill.errors import ConfigError, DataError
from tests.data import templates
from tests.data.support import decoded, run, shown, write
from tests.support import make_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHOWN = "<|user|>hi<|end|><|assistant|>«yo<|end|>»"
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"text": "hi"}, "h«i»"),
    "messages": ({"messages": CHAT}, SHOWN),
    "parts": (
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]},
        SHOWN,
    ),
    "system": (
        {"messages": CHAT, "system": "be", "chat_template_kwargs": {"x": 1}},
        "<|system|>be<|end|>" + SHOWN,
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, SHOWN),
    "prompt and completion": ({"prompt": "hi ", "completion": "yo"}, "hi «yo</s>»"),
    "with an end of its own": ({"prompt": "hi ", "completion": "yo</s>"}, "hi «yo</s>»"),
    "messages of both": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, SHOWN),
    "a longer prompt": (
        {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]},
        SHOWN.translate({171: "", 187: ""}) + SHOWN,
    ),
    "alpaca": ({"instruction": "hi", "output": "yo"}, SHOWN),
    "alpaca with input": ({"instruction": "hi", "input": "a", "output": "yo"}, SHOWN.replace("hi", "hi\n\na")),
    "ids": ({"input_ids": [1, 96, 98]}, "<s>«{}»"),
    "labels": ({"input_ids": [1, 96, 98], "labels": [-100, -100, 98]}, "<s>{«}»"),
    "loss_mask": ({"input_ids": [1, 96, 98], "loss_mask": [0, 1, 0]}, "<s>«{»}"),
    "completion_mask": ({"input_ids": [1, 96, 98], "completion_mask": [0, 0, 1]}, "<s>{«}»"),
    "assistant_masks": ({"input_ids": [1, 96, 98], "assistant_masks": [0, 0, 1]}, "<s>{«}»"),
    "prompt_length": ({"input_ids": [1, 96, 98], "prompt_length": 2}, "<s>{«}»"),
    "prompt_ids": ({"prompt_ids": [1, 96], "completion_ids": [98]}, "<s>{«}»"),
    "padding": (
        {
            "input_ids": [0, 1, 96, 98, 0, 0],
            "attention_mask": [0, 1, 1, 1, 0, 0],
            "labels": [-100, -100, -100, 98, -100, -100],
        },
        "<s>{«}»",
    ),
}  # fmt: skip


def tokenizer():
    made = make_tokenizer(chat=True)
    assert made.decode([96, 98]) == "{}"
    return made


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_recognized_by_its_columns(tmp_path, name):
    row, expected = FORMS[name]
    for kind in ("x.jsonl", "x.parquet"):
        path = tmp_path / kind
        write(path, [row]) if kind == "x.jsonl" else datasets.Dataset.from_list([row]).to_parquet(path)
        samples = run(f"dataset.path={path}", tokenizer=tokenizer())
        assert shown(samples, tokenizer()) == [expected]
        assert ("loss_mask" in samples.columns) == (name not in ("text", "ids"))


def test_a_mask_that_comes_late_is_not_ignored(tmp_path):
    rows = [{"input_ids": [1, 96, 98]}] * 150
    path = write(tmp_path / "x.jsonl", [*rows, {"input_ids": [1, 96, 98], "labels": [-100, -100, 98]}])
    with pytest.raises(DataError, match="found 'labels' too in example 150"):
        run(f"dataset.path={path}")


def test_one_chat_alone_in_a_file(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"messages": CHAT}, indent=1))
    assert shown(run(f"dataset.path={tmp_path / 'x.json'}", tokenizer=tokenizer()), tokenizer()) == [SHOWN]


def test_alpaca_without_a_chat_template(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "hi", "input": "a", "output": "yo"}])
    assert shown(run(f"dataset.path={path}")) == ["hi\n\na\n\n«yo</s>»"]


def test_two_readings(tmp_path, caplog):
    """The program says which it took, and how to take the other."""
    path = write(tmp_path / "x.jsonl", [{"text": "ab", "messages": CHAT, "instruction": "hi", "output": "yo"}])
    assert shown(run(f"dataset.path={path}", tokenizer=tokenizer())) == [SHOWN]
    assert "read as messages (messages)" in caplog.text
    assert "dataset.form=instruction or text reads them otherwise" in caplog.text
    for how in ("dataset.form=text", "dataset.text_column=text"):
        assert shown(run(f"dataset.path={path}", how, tokenizer=tokenizer())) == ["a«b»"]
    with pytest.raises(ConfigError, match="expected one of text_column, messages_column and form"):
        run(f"dataset.path={path}", "dataset.form=text", "dataset.messages_column=messages")
    path = write(tmp_path / "x.jsonl", [{"dialog": CHAT, "body": "ab"}])
    assert shown(run(f"dataset.path={path}", "dataset.messages_column=dialog", tokenizer=tokenizer())) == [SHOWN]
    assert shown(run(f"dataset.path={path}", "dataset.text_column=body")) == ["a«b»"]
    with pytest.raises(DataError, match=r"dataset.text_column: expected a column 'x' in .*, found dialog, body"):
        run(f"dataset.path={path}", "dataset.text_column=x")


def test_a_chat_template_of_the_users_own(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"has no chat template for the column messages; dataset.chat_template=FILE"):
        run(f"dataset.path={path}")
    (tmp_path / "t.jinja").write_text(templates.QWEN3)
    arguments = [f"dataset.path={path}", f"dataset.chat_template={tmp_path / 't.jinja'}"]
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert shown(run(*arguments)) == [f"{head}«<think>\n\n</think>\n\nyo<|im_end|>»\n"]
    arguments += ["dataset.chat_template_kwargs={enable_thinking: false}"]
    assert shown(run(*arguments)) == [f"{head}<think>\n\n</think>\n\n«yo<|im_end|>»\n"]
    rows = [{"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}]  # a row's own win
    write(path, rows)
    assert shown(run(*arguments)) == [f"{head}«<think>\n\n</think>\n\nyo<|im_end|>»\n"]
    with pytest.raises(DataError, match=r"dataset\.chat_template: cannot read nowhere"):
        run(f"dataset.path={path}", "dataset.chat_template=nowhere")


@pytest.mark.parametrize("kind", ["x.jsonl", "x.parquet", "saved"])
def test_tools_and_their_arguments_reach_the_template_unchanged(tmp_path, kind):
    """Arrow gives every dict of a column the keys of all: they are taken away again, at every depth."""
    (tmp_path / "t.jinja").write_text("{{ tools | tojson }}" + templates.LLAMA.split("%}", 1)[1])
    calls = [{"name": "f", "arguments": {"a": {"b": 1}}}, {"name": "g", "arguments": {"c": [{"d": 2}, {"e": 3}]}}]
    rows = [
        {
            "messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}],
            "tools": [{"type": "function", "function": {"name": call["name"], "parameters": call["arguments"]}}],
        }
        for call in calls
    ]
    path = tmp_path / kind
    if kind == "x.jsonl":
        write(path, rows)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    found = shown(run(f"dataset.path={path}", f"dataset.chat_template={tmp_path / 't.jinja'}"))
    assert '{"name": "f", "parameters": {"a": {"b": 1}}}' in found[0]
    assert '«{"name": "f", "arguments": {"a": {"b": 1}}}<|eot_id|>»' in found[0]
    assert '«{"name": "g", "arguments": {"c": [{"d": 2}, {"e": 3}]}}<|eot_id|>»' in found[1]


def test_tools_that_the_template_leaves_out_are_said(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT, "tools": None}])
    run(f"dataset.path={path}", tokenizer=tokenizer())
    assert "1 have tools, which the chat template leaves out" in caplog.text


def test_a_beginning_is_not_doubled(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", [{"text": "<s>ab"}, {"text": "ab"}])
    assert decoded(run(f"dataset.path={path}", tokenizer=make_tokenizer(bos=True))) == [(0, "<s>ab"), (1, "<s>ab")]
    assert "1 begin with <s> already and got no second one" in caplog.text
    write(path, [{"prompt": "<s>a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    found = shown(run(f"dataset.path={path}", tokenizer=make_tokenizer(bos=True)), make_tokenizer(bos=True))
    assert found == ["<s>a«b</s>»", "<s>«b</s>»"]


def test_no_token_lies_in_both_prompt_and_completion(tmp_path):
    """The model is asked with the prompt's own tokens: a merge across the border would never be seen again."""
    from tokenizers import Tokenizer

    made = make_tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["vocab"]["ab"] = 262
    state["model"]["merges"] = [["a", "b"]]
    made._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert made("ab")["input_ids"] == [262]
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "bab"}])
    samples = run(f"dataset.path={path}", tokenizer=made, vocab_size=263)
    assert samples.take([0])["tokens"].tolist() == [*made("a")["input_ids"], *made("b")["input_ids"], 262, 2]
    assert samples.take([0])["loss_mask"].tolist() == [True, True, True, False]


def logprobs(*rows: dict[str, Any], path: Path) -> list[list[float]]:
    """What becomes of a column `logprobs`, of each sample."""
    samples = run(f"dataset.path={write(path, list(rows))}", "dataset.max_length=4", tokenizer=tokenizer())
    assert samples.columns[-1] == "sampled_logprob"
    return [samples.take([i])["sampled_logprob"].tolist() for i in range(len(samples.lengths))]


NAN = pytest.approx(math.nan, nan_ok=True)


def test_log_probabilities_move_with_their_tokens(tmp_path):
    """Row t is about token t + 1, and only a token that is trained on has one; a shift by one would be seen."""
    apart = {"prompt_ids": [1, 96], "completion_ids": [98, 97]}
    forms = [
        [-0.5, -2],  # ours, TRL's
        [None, None, -0.5, -2],
        [[-0.5, 98, None], [-2, 97, "|"]],  # SGLang's
        [{"98": {"logprob": -0.5, "rank": 2}, "5": {"logprob": -0.1}}, {"97": {"logprob": -2}}],  # vLLM's
        [{"token": "}", "logprob": -0.5}, {"token": "|", "logprob": -2}],  # OpenAI's
    ]
    expected = [NAN, -0.5, -2, NAN]
    assert logprobs(*({**apart, "logprobs": form} for form in forms), path=tmp_path / "x.jsonl") == [expected] * 5
    masked = {"input_ids": [1, 96, 98, 97, 99], "labels": [-100, 96, -100, 97, 99]}
    found = logprobs(
        {**masked, "logprobs": [-9, -1, -3, -0.25, -7]},
        {**masked, "logprobs": [-1, -0.25, -7]},
        path=tmp_path / "y.jsonl",
    )
    assert found == [[-1, NAN, -0.25, NAN]] * 2  # cut at 4 tokens
    padded = {"input_ids": [0, 1, 96, 98], "attention_mask": [0, 1, 1, 1], "logprobs": [None, None, -1, 1e-6]}
    assert logprobs(padded, path=tmp_path / "z.jsonl") == [[-1, 0, NAN]]
    rows = [{**apart, "logprobs": [-1, -2]}, apart]
    with pytest.raises(DataError, match="2 entries, or 4, in 'logprobs' of example 1, one for each token, found None"):
        run(f"dataset.path={write(tmp_path / 'late.jsonl', rows)}", tokenizer=tokenizer())
    rows = [*[apart] * 120, rows[0]]
    with pytest.raises(DataError, match=r"columns of the first examples, found 'logprobs' too in ex.* 120"):
        run(f"dataset.path={write(tmp_path / 'later.jsonl', rows)}", tokenizer=tokenizer())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no chat": ({"messages": "hello"}, "in 'messages' of example 1, found 'hello'"),
    "no role": ({"messages": [{"content": "x"}]}, "found no role in 'messages' of example 1, message 0"),
    "an unknown speaker": ({"conversations": [{"from": "x", "value": "y"}]}, "a role of .* example 1, message 0"),
    "text and messages": ({"prompt": "a", "completion": CHAT[1:]}, "in both 'prompt' and 'completion' of example 1"),
    "an id too large": ({"input_ids": [1, 262]}, "ids below 262, .* in 'input_ids' of example 1, found 262"),
    "an id too small": ({"input_ids": [1, -1]}, "ids below 262, .* in 'input_ids' of example 1, found -1"),
    "no ids": ({"input_ids": ["a"]}, "expected a list of token ids in 'input_ids' of example 1"),
    "another length": ({"input_ids": [1, 2], "loss_mask": [1]}, "expected 2 entries in 'loss_mask' of example 1, .* 1"),
    "shifted labels": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "found 2 beside 1 at position 0 of example 1"),
    "no mask": ({"input_ids": [1, 2], "loss_mask": [0.5, 1]}, "expected zeros and ones in 'loss_mask' of example 1"),
    "beyond": ({"input_ids": [1, 2], "prompt_length": 3}, "expected a prompt_length of 0 to 2 in example 1"),
    "all masked": ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "a token to train on in 'loss_mask' of example 1"),
    "few logprobs": ({"input_ids": [1, 2], "labels": [1, 2], "logprobs": [0]}, "2 entries in 'logprobs' of .* 1, .* 1"),
    "many logprobs": (
        {"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [0, 0]}, "1 entries, or 3, in 'logprobs' .* found 2"
    ),
    "no logprob": (
        {"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [None]}, "'logprobs' at token 2 of example 1 .id 3."
    ),
    "a probability": (
        {"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [0.5]}, "a log-probability .* token 2 of example 1"
    ),
    "of another token": (
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [[-1, 3, None], [-1, 3, None]]},
        "a log-probability in 'logprobs' at token 3 of example 1 .id 4., found",
    ),
    "a hole": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "ones between padding in example 1"),
    "half a character": (
        {"messages": [{"role": "user", "content": "a\ud83d"}, CHAT[1]]},
        "'messages' of example 1, found half of a surrogate pair",
    ),
    "a number": ({"messages": [CHAT[0], {"role": "assistant", "content": 5}]}, "found 5 .int."),
    "no json": ({"messages": CHAT, "tools": "{"}, "tools: expected JSON in 'messages' of example 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_examples_are_named(tmp_path, name):
    row, message = BAD[name]
    good: dict[str, Any] = {"messages": CHAT, "prompt": "a", "completion": "b", "input_ids": [1, 2], "labels": [1, 2]}
    good |= {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1, -1][: 2 - ("prompt_ids" in row)]}
    good |= {"loss_mask": [0, 1], "prompt_length": 1, "attention_mask": [1, 1]}
    good |= {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "tools": None}
    path = write(tmp_path / "x.jsonl", [{column: good[column] for column in row}, row])
    with pytest.raises(DataError, match=message):
        run(f"dataset.path={path}", tokenizer=tokenizer())
