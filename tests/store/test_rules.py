"""The rules of rows that others captured: each is broken by one change, and by nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distill.store.rules import broken_rules

Rows = dict[str, Any]
NAN = np.nan


def captured_rows() -> Rows:
    """A sample of four tokens, three ids at most: a full row, a short one, one that is not learned from, the last."""
    ids = np.array([[5, 2, 7], [3, 9, -1], [-1, -1, -1], [-1, -1, -1]], np.int32)
    logprobs = np.log([[0.5, 0.2, 0.1], [0.6, 0.3, NAN], [NAN] * 3, [NAN] * 3]).astype(np.float16)
    return {
        "tokens": np.array([1, 2, 3, 4], np.int32),
        "loss_mask": np.array([True, True, False, False]),
        "last": np.array([False, False, False, True]),
        "target_ids": ids,
        "target_logprobs": logprobs,
        "tail_logprob": np.log([[0.2], [0.1], [NAN], [NAN]]).astype(np.float16),
        "logsumexp": np.full((4, 1), NAN, np.float32),
        "next_logprob": np.array([np.log(0.2), NAN, NAN, NAN], np.float16),
    }


ATTRIBUTES = {"method": "topk", "vocab_size": 10, "temperatures": [1.0]}
UNKNOWN = {**ATTRIBUTES, "unknown": ["logsumexp", "next_logprob"]}


def test_what_is_unknown_may_lack() -> None:
    assert broken_rules(captured_rows(), UNKNOWN) == []
    assert len(broken_rules(captured_rows(), ATTRIBUTES)) > 4


def put(name: str, where: Any, value: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[name][where] = value

    return change


@pytest.mark.parametrize(
    ("change", "unknown", "broken"),
    [
        (put("loss_mask", 2, True), UNKNOWN, ["target_ids: none in a row that is learned from"]),
        (put("target_logprobs", (1, 2), -9.0), UNKNOWN, ["target_logprobs: one without an id, or an id without one"]),
        (put("tail_logprob", (1, 0), NAN), UNKNOWN, [
            "tail_logprob: none in a row with ids",
            "target_logprobs and tail_logprob: the probabilities do not add up to 1",
        ]),
        (put("tail_logprob", (2, 0), -1.0), UNKNOWN, [
            "tail_logprob: one in a row without ids, or one that is unknown"
        ]),
        (put("logsumexp", (0, 0), 3.0), UNKNOWN, ["logsumexp: one that is unknown"]),
        (put("logsumexp", (0, 0), NAN), {**UNKNOWN, "unknown": ["next_logprob"]}, ["logsumexp: not finite"]),
        (put("next_logprob", 0, -0.1), UNKNOWN, [
            "next_logprob: not what target_logprobs and tail_logprob say of the token that follows"
        ]),
        (put("next_logprob", 3, -0.1), UNKNOWN, ["next_logprob: one where no token follows, or none where one does"]),
        (put("next_logprob", 1, NAN), {**UNKNOWN, "unknown": ["logsumexp"]}, [
            "next_logprob: one where no token follows, or none where one does"
        ]),
        (put("target_ids", (0, 0), 10), UNKNOWN, ["target_ids: an id is outside the vocabulary"]),
        (put("target_ids", (0, 0), 7), UNKNOWN, ["target_ids: an id is there twice"]),
    ],
)  # fmt: skip
def test_each_rule(change: Callable[[Rows], None], unknown: dict[str, Any], broken: list[str]) -> None:
    rows = captured_rows()
    change(rows)
    assert broken_rules(rows, unknown) == broken
