"""How examples become samples: windows, cuts, what is dropped, and what is said about it."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError
from tests.data.support import decoded, run, shown, write
from tests.support import make_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_windows_truncation_and_limits(tmp_path):
    path = f"dataset.path={write(tmp_path / 'x.jsonl', [{'text': 'abc'}, {'text': ''}, {'text': 'x' * 25}])}"
    assert decoded(run(path, "dataset.max_length=10"))[1:] == [(2, "x" * 10), (2, "x" * 10), (2, "x" * 5)]
    assert decoded(run(path, "dataset.max_length=10", "dataset.long=truncate"))[1:] == [(2, "x" * 10)]
    assert decoded(run(path, "dataset.max_length=10", "dataset.long=drop")) == [(0, "abc")]
    assert decoded(run(path, "dataset.max_samples=2")) == [(0, "abc")]
    assert [len(text) for _, text in decoded(run(path, context=20))] == [
        3,
        20,
        5,
    ]  # no longer than the teacher can read
    with pytest.raises(
        DataError, match=r"at most 20, the teacher's context, found a sample of 25 tokens \(example 2 of"
    ):
        run(path, "dataset.max_length=null", context=20)


def test_every_window_begins_with_the_tokenizers_own_special_tokens(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    path = write(tmp_path / "x.jsonl", [{"text": "x" * 25}])
    samples = run(f"dataset.path={path}", "dataset.max_length=10", tokenizer=tokenizer)
    assert decoded(samples, tokenizer) == [(0, "<s>" + "x" * 9), (0, "<s>" + "x" * 9), (0, "<s>" + "x" * 7)]


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT * times} for times in (1, 3, 200)],
    "prompt_completion": [{"prompt": "hi", "completion": "yo" * times} for times in (1, 9, 600)],
    "tokens": [{"input_ids": [9, *[8] * times], "prompt_length": 1} for times in (5, 20, 1200)],
}


@pytest.mark.parametrize("form", ROWS)
def test_what_answers_a_question_is_never_split(tmp_path, form, caplog):
    """A window without its question would teach the teacher's opinion of the middle of a sentence."""
    path = f"dataset.path={write(tmp_path / 'x.jsonl', ROWS[form])}"
    tokenizer = make_tokenizer(chat=True)
    whole = run(path, tokenizer=tokenizer)  # as long as the data need, beyond 1024
    assert whole.source.tolist() == [0, 1, 2]
    assert whole.lengths[2] > 1024
    cut = run(path, "dataset.max_length=17", tokenizer=tokenizer)
    assert cut.lengths.tolist() == [min(17, length) for length in whole.lengths]
    texts = zip(shown(cut, tokenizer), shown(whole, tokenizer), strict=True)
    assert all(
        long.replace("«", "").replace("»", "").startswith(short.translate({171: "", 187: ""})[:60])
        for short, long in texts
    )
    lost = sum(
        int(whole.take([i])["loss_mask"].sum()) - int(cut.take([i])["loss_mask"].sum())
        for i in range(len(whole.lengths))
    )
    assert f"cut 2 at 17 tokens, with {lost:,} tokens to train on" in caplog.text
    dropped = run(path, "dataset.max_length=17", "dataset.long=drop", tokenizer=tokenizer)
    assert dropped.lengths.tolist() == [length for length in whole.lengths if length <= 17]
    assert "dropped 2 too long" in caplog.text
    assert max(run(path, context=600, tokenizer=tokenizer).lengths) == 600


def test_what_teaches_nothing_is_dropped_and_said(tmp_path, caplog):
    tokenizer = make_tokenizer(chat=True)
    rows = [{"messages": chat} for chat in (CHAT, [], CHAT[:1], None)]
    samples = run(f"dataset.path={write(tmp_path / 'x.jsonl', rows)}", tokenizer=tokenizer)
    assert samples.source.tolist() == [0]
    assert "4 examples of" in caplog.text
    assert "dropped 1 null, 1 empty, 1 without a token to train on" in caplog.text
    single = write(tmp_path / "z.jsonl", [{"text": "a"}, {"text": "ab"}])
    assert run(f"dataset.path={single}").source.tolist() == [1]  # of one token no other is predicted
    for only in (rows[1:], [{"messages": [{"role": "narrator", "content": "x"}]}]):
        path = write(tmp_path / "y.jsonl", only)
        with pytest.raises(
            DataError, match=r"found nothing; data: . examples .*dropped .*1 without a token to train on"
        ):
            run(f"dataset.path={path}", tokenizer=tokenizer)


def test_processes_give_the_same_samples(tmp_path):
    rows: list[dict[str, Any]] = [
        {"messages": [*CHAT, {"role": "user", "content": "x" * (i % 50)}, CHAT[1]]} for i in range(1000)
    ]
    path = f"dataset.path={write(tmp_path / 'x.jsonl', rows)}"
    tokenizer = make_tokenizer(chat=True)
    one, two = (run(path, f"dataset.num_proc={n}", tokenizer=tokenizer) for n in (1, 2))
    assert (one.lengths == two.lengths).all()
    everything = range(len(one.lengths))
    for name in ("tokens", "loss_mask", "source"):
        assert (one.take(everything)[name] == two.take(everything)[name]).all()
    rows[700] = {"messages": "x"}
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="example 700, found 'x'"):
        run(path, "dataset.num_proc=2", tokenizer=tokenizer)


def test_a_process_that_is_killed_is_said(tmp_path):
    """As the kernel does when memory is short: the run must not wait for it for ever, nor for one that is stopped."""
    rows = [{"text": json.dumps(list(range(2000)))}] * 20000
    path = write(tmp_path / "x.jsonl", rows)

    def children() -> list[int]:
        file = Path(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/children")
        return [int(child) for child in file.read_text().split()]

    before = children()

    def kill() -> None:
        while len(found := [child for child in children() if child not in before]) < 2:
            time.sleep(0.1)
        time.sleep(1.0)  # until they work
        for child in found:
            os.kill(child, signal.SIGSTOP)
        time.sleep(1.0)  # until what they were sent fills the pipe
        os.kill(found[-1], signal.SIGKILL)

    timer = threading.Thread(target=kill)
    timer.start()
    with pytest.raises(DataError, match="one of 2 processes that tokenize was killed"):
        run(f"dataset.path={path}", "dataset.num_proc=2")
    timer.join()
