"""From a dataset or a store to exact prompt ids."""

from pathlib import Path
from typing import Any

import pytest

from distill.errors import ConfigError, UserError
from distill.rollouts.prompts import Prompts
from tests.data.support import run as samples_of
from tests.rollouts.support import read, roll_out, write
from tests.store.webserver import WebServer, serving
from tests.support import generate_here, make_tokenizer, open_raw, save_model

ASK = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "student", chat=True, bos=True, vocab_size=300)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "plain", vocab_size=300)


def texts(prompts: Prompts) -> list[str]:
    return [make_tokenizer(chat=True).decode(prompts[i]) for i in range(len(prompts))]


ASKED = "<|user|>2 + 2?<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Water"}, "<s>Water"),
        ({"text": "<s>Water"}, "<s>Water"),
        ({"messages": [ASK]}, ASKED),
        ({"messages": [ASK, ANSWER]}, ASKED),
        ({"messages": [ASK, ANSWER, ASK, ANSWER]}, "<|user|>2 + 2?<|end|><|assistant|>4<|end|>" + ASKED),
        ({"messages": [ASK], "system": "Be brief."}, "<|system|>Be brief.<|end|>" + ASKED),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, ASKED),
        ({"prompt": "2 + 2 ="}, "<s>2 + 2 ="),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "<s>2 + 2 ="),
        ({"prompt": [ASK]}, ASKED),
        ({"prompt": [ASK], "completion": [ANSWER]}, ASKED),
        ({"instruction": "Add.", "output": "4"}, "<|user|>Add.<|end|><|assistant|>"),
        ({"instruction": "Add.", "input": "2 and 2"}, "<|user|>Add.\n\n2 and 2<|end|><|assistant|>"),
        ({"prompt_ids": [1, 76, 77], "completion_ids": [5]}, "<s>gh"),
        ({"messages": [ASK], "text": "no", "prompt": "no"}, ASKED),
    ],
)
def test_forms(row: dict[str, Any], expected: str, student: Path, tmp_path: Path) -> None:
    """Where there is an answer too, the prompt is what comes before it in the samples of distill.generate."""
    path = write(tmp_path / "x.jsonl", [row])
    found = read(student, f"prompts.path={path}")
    assert texts(found) == [expected]
    answered = {"completion", "output", "completion_ids"} & {*row} or "4" in str(row.get("messages", row))
    if answered and "text" not in row:
        sample = samples_of(f"dataset.path={path}", tokenizer=make_tokenizer(chat=True, bos=True)).take([0])
        if "messages" in row or "conversations" in row:  # several turns: the prompt is that of the last
            last = [i for i, on in enumerate(sample["loss_mask"]) if on and not sample["loss_mask"][i - 1]][-1]
        else:
            last = sample["loss_mask"].tolist().index(True)
        assert sample["tokens"][: last + 1].tolist() == found[0].tolist()


def test_other_columns_and_templates(student: Path, plain: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "Water", "dialog": [ASK]}])
    assert texts(read(student, f"prompts.path={path}", "prompts.text_column=body")) == ["<s>Water"]
    assert texts(read(student, f"prompts.path={path}", "prompts.messages_column=dialog")) == [ASKED]
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{{ mood }}")
    settings = [f"prompts.chat_template={template}", "prompts.chat_template_kwargs={mood: '!'}"]
    with pytest.raises(UserError, match=r"^prompts: expected a chat template with a generation prompt"):
        read(student, f"prompts.path={path}", "prompts.messages_column=dialog", *settings)
    template.write_text("{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}")
    found = read(plain, f"prompts.path={path}", "prompts.messages_column=dialog", settings[0])
    assert texts(found) == ["[user: 2 + 2?][assistant: "]  # what it writes before any answer
    instruction = write(tmp_path / "y.jsonl", [{"instruction": "Add.", "input": "2 and 2"}])
    assert texts(read(plain, f"prompts.path={instruction}")) == ["Add.\n\n2 and 2\n\n"]


def test_what_is_cut_and_dropped(student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a" * n} if n else {"text": None} for n in (3, 0, 9, 20, 4)] + [{"text": ""}]
    path = write(tmp_path / "x.jsonl", rows)
    with caplog.at_level("INFO"):
        found = read(student, f"prompts.path={path}", "prompts.max_length=8", context=64)
        assert found.numbers.tolist() == [0, 2, 3, 4]
        assert [len(found[i]) for i in range(4)] == [4, 8, 8, 5]
        assert read(student, f"prompts.path={path}", context=10).numbers.tolist() == [0, 4]
        chats = write(tmp_path / "y.jsonl", [{"prompt": [ASK]}, {"prompt": [{**ASK, "content": "a" * 50}]}])
        assert read(student, f"prompts.path={chats}", "prompts.max_length=20").numbers.tolist() == [0]
        assert read(student, f"prompts.path={chats}", "prompts.max_samples=1").numbers.tolist() == [0]
    said = [record.getMessage() for record in caplog.records if record.name == "distill.rollouts.prompts"]
    assert "6 examples of" in said[0]
    assert said[0].endswith("read as text (text); 1 dropped: null; 2 cut at 8 tokens; 1 dropped: empty")
    assert "2 dropped: which leave no room in the context" in said[1]
    assert "1 dropped: longer than prompts.max_length" in said[2]


def test_prompts_of_a_store(student: Path, plain: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab" * n, "completion": "cd"} for n in (1, 5, 2)] + [{"prompt": "", "completion": "cd"}]
    path = write(tmp_path / "x.jsonl", rows)
    made = [f"teacher.model={student}", "capture.k=8", f"store.path={tmp_path / 'x.zarr'}", f"dataset.path={path}"]
    store = generate_here(tmp_path, *made)
    found = read(student, f"prompts.path={store}")
    number = open_raw(store, "sample_index")
    expected = ["<s>" + "ab" * n for n in (1, 5, 2, 0)]
    assert texts(found) == [expected[i] for i in number]
    assert found.numbers.tolist() == [0, 1, 2, 3]
    assert len(read(student, f"prompts.path={store}", "prompts.max_samples=2")) == 2
    with serving(WebServer(tmp_path)) as server:
        from_web = read(student, f"prompts.path={server.url}/x.zarr")
        with pytest.raises(UserError, match=r"^prompts\.path: found no store at http"):
            read(student, f"prompts.path={server.url}/z.zarr")
    assert all((vars(from_web)[name] == values).all() for name, values in vars(found).items())
    short = read(student, f"prompts.path={store}", "prompts.max_length=4")
    assert texts(short) == [expected[i] for i in number if len(expected[i]) <= len("<s>abc")]
    unmasked = generate_here(
        tmp_path, f"teacher.model={plain}", "capture.k=8", f"store.path={tmp_path / 'y.zarr'}",
        f"dataset.path={write(tmp_path / 'y.jsonl', [{'text': 'water boils'}, {'text': 'abc'}])}",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^prompts.max_length: expected a number of tokens, as .* has no loss mask$"):
        read(plain, f"prompts.path={unmasked}")
    assert sorted(texts(read(plain, f"prompts.path={unmasked}", "prompts.max_length=5"))) == ["abc", "water"]
    with pytest.raises(UserError, match=r"^prompts\.path: "):
        read(plain, "prompts.path=nowhere://x")
    for setting in ("split=test", "text_column=a", "chat_template_kwargs={a: 1}", "data_files=x"):
        with pytest.raises(UserError, match=rf"^prompts.{setting.partition('=')[0]}: expected none beside the store "):
            read(student, f"prompts.path={store}", f"prompts.{setting}")


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (
            [{"other": 1}],
            [],
            "prompts.path: expected a column prompt_ids, messages, conversations, prompt, instruction",
        ),
        ([{"text": ""}], [], "prompts.path: expected something to continue, found nothing; prompts: 1 examples of"),
        ([{"text": 5}], [], "prompts: expected text in 'text' of example 0, found 5 (int)"),
        ([{"prompt": 5}], [], "prompts: expected text or messages in 'prompt' of example 0, found 5 (int)"),
        ([{"prompt_ids": [1]}, {"prompt_ids": [300]}], [], "prompts: expected token ids below 300, the student's"),
        ([{"messages": ["x"]}], [], "prompts: expected a list of {role, content} in 'messages' of example 0"),
        ([{"text": "a"}], ["prompts.text_column=b"], "prompts.text_column: expected a column 'b' in"),
        ([{"text": "a"}], ["prompts.split=test"], "prompts.split: expected train"),
        (
            [{"text": "a"}],
            ["prompts.text_column=a", "prompts.messages_column=b"],
            "prompts: expected one of text_column",
        ),
    ],
)
def test_refusals_name_the_key(rows: list[Any], arguments: list[str], said: str, student: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv" if "split" in str(arguments) else tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError) as found:
        read(student, f"prompts.path={path}", *arguments)
    assert str(found.value).startswith(said), found.value
    assert "\n" not in str(found.value)
    assert "dataset." not in str(found.value)


def test_an_output_in_a_store_is_refused(student: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "zarr.json").write_text("{}")
    settings = [f"student.model={student}", f"log_dir={tmp_path}", f"output={tmp_path / 'x.zarr' / 'out'}"]
    with pytest.raises(ConfigError, match=r"output: expected a folder outside of stores, found .*/out, inside"):
        roll_out(*settings)
    assert not (tmp_path / "x.zarr" / "out").exists()


def test_no_prompts(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prompts\.path: found no file or folder /nowhere\.jsonl$"):
        read(student, "prompts.path=/nowhere.jsonl")
    with pytest.raises(UserError, match=r"^student\.model=.*expected a Hugging Face id or a model's folder"):
        read(tmp_path / "none", "prompts.path=demo")
    assert len(read(student, "prompts.max_samples=2")) == 2
