import json

import datasets
import numpy as np
import pytest

from distill.config import GenerateConfig
from distill.data.dataset import identity
from distill.data.tokenize import tokenize
from distill.errors import DataError
from distill.settings import load
from tests.support import make_tokenizer

TEXTS = ["abc", "", "hello world", "x" * 25, None]


def run(*arguments, tokenizer=None, context=None):
    return tokenize(load(GenerateConfig, arguments).dataset, tokenizer or make_tokenizer(), context)


def decoded(samples, tokenizer=None):
    """Each sample's source and text."""
    tokenizer = tokenizer or make_tokenizer()
    found = [samples.take(np.array([i])) for i in range(len(samples.lengths))]
    return [(int(sample["source"][0]), tokenizer.decode(sample["tokens"])) for sample in found]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sources(tmp_path):
    """The same texts in every form that can be read."""
    rows = [{"text": text, "other": 1} for text in TEXTS]
    write(tmp_path / "x.jsonl", rows)
    write(tmp_path / "x.json", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "x.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "saved", "splits", "folder"])
def test_every_source_gives_the_same_samples(sources, name, streaming):
    samples = run(f"dataset.path={sources / name}", f"dataset.streaming={streaming}")
    assert decoded(samples) == [(0, "abc"), (2, "hello world"), (3, "x" * 25)]
    assert samples.lengths.tolist() == [3, 11, 25]
    assert not samples.has_loss_mask


def test_text_files_builders_and_splits(sources):
    (sources / "x.txt").write_text("one\n\ntwo\n")
    assert decoded(run(f"dataset.path={sources / 'x.txt'}")) == [(0, "one"), (2, "two")]
    assert len(run("dataset.path=json", f"dataset.data_files={sources / 'x.jsonl'}").lengths) == 3
    assert len(run(f"dataset.path={sources / 'splits'}", "dataset.split=test").lengths) == 1
    with pytest.raises(DataError, match="expected train or test, found validation"):
        run(f"dataset.path={sources / 'splits'}", "dataset.split=validation")


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_windows_truncation_and_limits(sources, streaming):
    path = f"dataset.path={sources / 'x.jsonl'}"
    stream = f"dataset.streaming={streaming}"
    assert decoded(run(path, stream, "dataset.max_length=10"))[-3:] == [(3, "x" * 10), (3, "x" * 10), (3, "x" * 5)]
    assert decoded(run(path, stream, "dataset.max_length=10", "dataset.long=truncate"))[-1] == (3, "x" * 10)
    assert decoded(run(path, stream, "dataset.max_samples=3")) == [(0, "abc"), (2, "hello world")]
    with pytest.raises(
        DataError, match=r"at most 20, the teacher's context, found a sample of 25 tokens \(example 3 of"
    ):
        run(path, stream, context=20)


def test_every_window_begins_with_the_tokenizers_own_special_tokens(sources):
    tokenizer = make_tokenizer(bos=True)
    samples = run(f"dataset.path={sources / 'x.jsonl'}", "dataset.max_length=10", tokenizer=tokenizer)
    assert decoded(samples, tokenizer)[-3:] == [(3, "<s>" + "x" * 9), (3, "<s>" + "x" * 9), (3, "<s>" + "x" * 7)]
    assert samples.lengths.max() == 10


CHAT = [
    {"role": "user", "content": "hi yo"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "yo"},
    {"role": "assistant", "content": "hi yo"},
]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_the_loss_mask_marks_what_the_assistant_says_next(tmp_path, streaming):
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT}, {"messages": []}, {"messages": CHAT[:1]}])
    tokenizer = make_tokenizer(chat=True)
    samples = run(
        f"dataset.path={path}",
        "dataset.messages_column=messages",
        f"dataset.streaming={streaming}",
        tokenizer=tokenizer,
    )
    assert len(samples.lengths) == 2
    first = samples.take(np.array([0]))
    tokens, mask = first["tokens"], first["loss_mask"]
    assert mask.dtype == bool
    expected = "<|user|>hi yo<|end|><|assistant|>yo<|end|><|user|>yo<|end|><|assistant|>hi yo<|end|>"
    assert tokenizer.decode(tokens) == expected
    learned = [tokenizer.decode([tokens[i + 1]]) for i in range(len(tokens) - 1) if mask[i]]
    assert "".join(learned) == "yo<|end|>hi yo<|end|>"
    assert not mask[-1]
    assert not samples.take(np.array([1]))["loss_mask"].any()


def test_chats_that_templates_rewrite(tmp_path):
    """A template that trims, and shows only the last turn's reasoning, as Qwen3's does."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'].split('</think>')[-1].strip() if not loop.last else m['content'].strip() }}<|end|>{% endfor %}"
    )
    chat = [dict(turn) for turn in CHAT]
    chat[1]["content"] = "<think>hm</think> one "
    chat[3]["content"] = "<think>ho</think> two "
    path = write(tmp_path / "x.jsonl", [{"messages": chat}])
    samples = run(f"dataset.path={path}", "dataset.messages_column=messages", tokenizer=tokenizer)
    found = samples.take(np.array([0]))
    learned = [tokenizer.decode([t]) for t, m in zip(found["tokens"][1:], found["loss_mask"][:-1], strict=True) if m]
    assert "".join(learned) == "one<|end|><think>ho</think> two<|end|>"


def learned_from(tokenizer, chat, tmp_path):
    """The text that a student of this chat learns to say."""
    path = write(tmp_path / "x.jsonl", [{"messages": chat}])
    samples = run(f"dataset.path={path}", "dataset.messages_column=messages", tokenizer=tokenizer)
    found = samples.take(np.array([0]))
    return "".join(
        tokenizer.decode([token])
        for token, mask in zip(found["tokens"][1:], found["loss_mask"][:-1], strict=True)
        if mask
    )


def test_end_of_turn_tokens_that_are_not_declared_as_special(tmp_path):
    tokenizer = make_tokenizer(chat=True, declared=False)
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in tokenizer.all_special_ids
    assert learned_from(tokenizer, CHAT, tmp_path) == "yo<|end|>hi yo<|end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", " <|end|>")  # a blank before it
    assert learned_from(tokenizer, CHAT, tmp_path) == "yo <|end|>hi yo <|end|>"


def test_tool_calls_and_empty_turns(tmp_path):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
        "{% if m['tool_calls'] %}call:{{ m['tool_calls'] }}{% endif %}<|end|>{% endfor %}"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok ", "tool_calls": "f(x)"}]
    assert learned_from(tokenizer, chat, tmp_path) == "ok call:f(x)<|end|>"
    chat[1]["content"] = ""
    assert learned_from(tokenizer, chat, tmp_path) == "call:f(x)<|end|>"
    chat[1]["tool_calls"] = ""
    assert learned_from(tokenizer, chat, tmp_path) == "<|end|>"


def test_templates_that_mark_the_assistants_words(tmp_path):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    assert learned_from(tokenizer, CHAT, tmp_path) == "yo<|end|>hi yo<|end|>"


def test_later_windows_of_a_chat_begin_as_the_first_does(tmp_path):
    tokenizer = make_tokenizer(chat=True, bos=True)
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    path = write(tmp_path / "x.jsonl", [{"messages": CHAT}])
    arguments = [f"dataset.path={path}", "dataset.messages_column=messages", "dataset.max_length=10"]
    samples = run(*arguments, tokenizer=tokenizer)
    windows = [samples.take(np.array([i])) for i in range(len(samples.lengths))]
    assert len(windows) == 3
    for window in windows:
        assert tokenizer.decode(window["tokens"]).startswith("<s>")
        assert len(window["tokens"]) == len(window["loss_mask"]) <= 10
        assert not window["loss_mask"][-1]
    assert not windows[1]["loss_mask"][0]


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 5}\n', None),
        ('{"text": [5]}\n', "expected text in 'text', found"),
        ('{"text": "a"}\n{"text\n', "cannot load"),
        ("", "cannot load|found no rows"),
    ],
)
def test_bad_files_are_data_errors(tmp_path, content, message, streaming):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        run(f"dataset.path={tmp_path / 'x.jsonl'}", f"dataset.streaming={streaming}")


@pytest.mark.parametrize("messages", ["hello", [{"content": "no role"}], [1]])
def test_what_is_no_chat_is_refused(tmp_path, messages):
    path = write(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"expected a list of \{role, content\} in 'messages', example 0, found"):
        run(f"dataset.path={path}", "dataset.messages_column=messages", tokenizer=make_tokenizer(chat=True))


def test_identity_follows_the_content(sources):
    def of(*arguments):
        return identity(load(GenerateConfig, arguments).dataset, ours=[str(sources / "out")])

    before = of(f"dataset.path={sources / 'x.jsonl'}")
    assert before == of(f"dataset.path={sources / 'folder' / 'x.jsonl'}")  # wherever it is
    (sources / "x.jsonl").write_text((sources / "x.jsonl").read_text().replace("abc", "abd"))
    assert before != of(f"dataset.path={sources / 'x.jsonl'}")
    assert of("dataset.path=some/hub-id")["dataset.remote"] == ["some/hub-id"]
    assert of("dataset.path=some/hub-id", "dataset.data_files=a*")["dataset.remote"] == ["some/hub-id", "a*"]
    before = of(f"dataset.path={sources}")
    (sources / "out").mkdir()
    (sources / "out" / "x.jsonl").write_text("a run's own output")
    assert before == of(f"dataset.path={sources}")
    files = of("dataset.path=json", f"dataset.data_files={sources}/*.jsonl")
    assert (
        files["dataset.content"]
        == of("dataset.path=json", f"dataset.data_files=[{sources / 'x.jsonl'}]")["dataset.content"]
    )
