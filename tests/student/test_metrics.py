"""What a training run measured, as it is kept."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.student.metrics import Metrics, summary


def test_what_is_measured_again_replaces_what_was(tmp_path: Path) -> None:
    """A run that is stopped at step 6 and goes on from its checkpoint of step 4."""
    before = Metrics(tmp_path, 0, visible=True)
    for step in range(1, 7):
        before.add({"step": step, "loss": 1.0})
    after = Metrics(tmp_path, 4, visible=True)
    after.add({"step": 5, "loss": 0.5})
    after.add({"step": 5, "held_out": {"kl": 0.25}})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert losses == [*((step, 1.0) for step in range(1, 5)), (5, 0.5)]
    assert lines[-1] == {"step": 5, "held_out": {"kl": 0.25}}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == losses
    assert [(event.step, event.value) for event in board.Scalars("held_out/kl")] == [(5, 0.25)]


def test_workers_but_the_first_keep_nothing(tmp_path: Path) -> None:
    Metrics(tmp_path / "out", 0, visible=False).add({"step": 1, "loss": 1.0})
    assert not (tmp_path / "out").exists()


def test_every_line_is_json(tmp_path: Path) -> None:
    """Also with figures that are not finite, and after a restart of a run that has written such."""

    def no_number(word: str) -> None:
        raise AssertionError(word)

    held_out = {"tokens": 3, "cross_entropy": float("inf"), "kl": float("nan"), "top1_agreement": 0.5}
    Metrics(tmp_path, 0, visible=True).add({"step": 1, "held_out": {**held_out, "calibration_error": 0.25}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')  # as it was written once
    Metrics(tmp_path, 2, visible=True).add({"step": 3, "loss": float("-inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=no_number) for line in text.splitlines()]
    assert [line.get("loss") for line in lines] == [None, None, None]
    assert lines[0]["held_out"] == {**held_out, "cross_entropy": None, "kl": None, "calibration_error": 0.25}
    assert "inf/nan" in summary(tmp_path)
    assert "0.5000" in summary(tmp_path)
