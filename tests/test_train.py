"""distill.train, launched for real."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

import distill.train
from distill import DistillationLoss, Learner, TeacherCache
from distill.config.train import OptimizerConfig, StudentConfig, TrainConfig
from distill.errors import ConfigError
from distill.run.grid import Grid
from distill.settings import load
from distill.student.batches import split
from distill.student.evaluate import evaluate
from distill.student.model import build, find
from distill.student.optimizer import optimizer_of
from distill.teacher.source import auto_class
from tests.processes import children, freeze
from tests.support import environment, has, save_model, tree, wait_for


def command(workers: int, arguments: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(workers)] if workers > 1 else []
    return [sys.executable, *launcher, "-m", "distill.train", *arguments]


def train(folder: Path, workers: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workers, arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    return [process for child in children(pid) for process in (child, *descendants(child))]


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_an_output_in_a_store_is_refused_first(small_store: Path, tmp_path: Path) -> None:
    output, nobody = small_store / "out", cast(Any, None)
    config = load(TrainConfig, [f"store.path={small_store}", f"output={output}", f"log_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"output: expected a folder outside of stores, found .*/out, inside"):
        distill.train.train(config, Grid(), nobody)
    assert not output.exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "divergence"), [("llama", "on_policy"), ("mistral3", "forward_kl")])
def test_the_first_step_is_that_of_the_mean_over_all_tokens(
    name: str, divergence: str, parallel: str, small_store: Path, model_folder: Any, tmp_path: Path
) -> None:
    """Two workers with three batches each, of samples of very different lengths, beside one pass over all of them.

    Of a model with a tower for images only the language model changes; it is saved whole. With on_policy the held-out
    figures of rollouts are there, and are those of one worker.
    """
    arguments = [
        f"store.path={small_store}",
        f"student.model={model_folder(name)}",
        "student.layers=2",
        "optimizer.steps=1",
        "batch.samples=3",
    ]
    arguments += ["batch.accumulate=3", "batch.readers=0", "evaluation.samples=7", f"parallel={parallel}", "output=out"]
    ran = train(tmp_path, 2, *arguments, f"loss.divergence={divergence}")
    assert ran.returncode == 0, ran.stderr
    before_it, first, _ = metrics(tmp_path / "out")

    cache, held_out = TeacherCache(str(small_store)).split(7, 0)
    source = find(StudentConfig(), {"model": str(model_folder(name)), "revision": None})
    learner = Learner(build(StudentConfig(layers=2), source, 0), DistillationLoss(divergence), cache.temperatures)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    alone = evaluate(learner, held_out, 64, torch.device("cpu"), divergence == "on_policy")
    dist.destroy_process_group()
    assert before_it["held_out"] == pytest.approx(alone, rel=1e-5)
    assert ("reverse_kl" in alone) == ("reverse KL, estimated" in ran.stderr) == (divergence == "on_policy")
    saved, info = auto_class(source.model_config).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    before = dict(learner.model.named_parameters())
    assert before.keys() == {key for key, _ in saved.named_parameters()}
    for key, weight in saved.named_parameters():
        assert weight.equal(before[key]) == (not before[key].requires_grad), key
    total, tokens = torch.zeros(()), 0
    for rank in range(2):
        batches = iter(cache.shuffled(3, 0, rank, 2))
        for _ in range(3):
            batch = next(batches)
            total, tokens = total + learner(batch), tokens + int(batch["loss_mask"].sum())
    (total / tokens).backward()
    norm = torch.nn.utils.get_total_norm([w.grad for w in learner.parameters() if w.grad is not None])
    assert first["tokens"] == tokens
    assert first["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_killed_run_goes_on_as_if_nothing_had_been(small_store: Path, sampled_store: Path, tmp_path: Path) -> None:
    """Of two stores, of other methods and widths, 3 to 1; the smaller share is of the larger store in the end."""
    save_model("llama", tmp_path / "student", attention_dropout=0.1, num_hidden_layers=2)
    arguments = [f"store.path=[{small_store},{sampled_store}]", "store.weights=[3,1]", "student.model=./student"]
    arguments += ["optimizer.steps=24", "batch.samples=4"]
    arguments += ["batch.readers=1", "evaluation.samples=40", "evaluation.every=7", "checkpoint_every=5"]
    whole = train(tmp_path, 2, *arguments, "output=whole")
    assert whole.returncode == 0, whole.stderr
    assert "KL to teacher" in whole.stderr

    def begin(until: int, *changes: str) -> subprocess.Popen[str]:
        launcher = subprocess.Popen(
            command(2, [*arguments, "output=killed", *changes]),
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        saved = tmp_path / "killed" / "checkpoints"
        wait_for(lambda: any((saved / f"step_{step}").is_dir() for step in range(until, 25)))
        return launcher

    launcher = begin(5, f"store.path=[file://{small_store},{sampled_store}]")  # forkserver
    processes = descendants(launcher.pid)
    assert len(processes) >= 2 + 2 * 3  # each worker's reader, forkserver and resource tracker
    for _ in range(2):  # as SLURM does
        for process in [launcher.pid, *processes]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
    _, console = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    told = re.search(r"stopped by SIGTERM at (\d+) of 24 steps; a checkpoint of step \1 is there, and", console)
    assert told is not None, console
    assert (tmp_path / "killed" / "checkpoints" / f"step_{told[1]}").is_dir()

    launcher = begin(10)
    for process in [*children(launcher.pid), launcher.pid]:
        os.kill(process, signal.SIGKILL)
    launcher.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    (tmp_path / "killed" / "checkpoints" / "step_99.partial").mkdir()  # cut off in the middle
    resumed = train(tmp_path, 2, *arguments, "output=killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 0 of" not in resumed.stderr
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert any((tmp_path / "killed" / "tensorboard").iterdir())
    kept = sorted(entry.name for entry in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["step_20", "step_24"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "killed")
    assert student.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "killed")) == 262
    held_out = [line["held_out"] for line in metrics(tmp_path / "killed") if "held_out" in line]
    assert held_out[-1]["kl"] < held_out[0]["kl"]

    changes = [f"store.path=[{sampled_store},{small_store}]", "store.weights=[1,2]", "loss.alpha=0.5"]
    other = train(tmp_path, 1, *arguments, *changes, "output=killed")
    assert other.returncode == 2
    of_stores = [TeacherCache(str(store)).attributes["fingerprint"] for store in (small_store, sampled_store)]
    assert f"store: the checkpoint has {of_stores}, this run {of_stores[::-1]}" in other.stderr
    assert "store.weights: the checkpoint has ['3/4', '1/4'], this run ['1/3', '2/3']" in other.stderr
    assert "loss.alpha: the checkpoint has 1.0, this run 0.5" in other.stderr
    assert "workers: the checkpoint has 2, this run 1" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_worker_that_hangs_is_named(small_store: Path, tmp_path: Path) -> None:
    arguments = [f"store.path={small_store}", "student.layers=1", "optimizer.steps=5000", "batch.samples=4"]
    arguments += ["batch.readers=0", "evaluation.samples=0", "output=out", "timeout_seconds=4"]
    with (tmp_path / "console").open("wb") as console:
        launcher = subprocess.Popen(command(2, arguments), cwd=tmp_path, env=environment(), stderr=console)
    wait_for(lambda: has(tmp_path / "out" / "metrics.jsonl", '"loss"'))
    freeze(launcher)
    assert launcher.wait(timeout=60) == 1
    said = (tmp_path / "console").read_text()
    assert "worker 1 has made no progress for 4 s (timeout_seconds)" in said
    assert f"the end of its log, {tmp_path}/logs/worker_1.log:" in said


def test_a_second_run_in_one_output_is_refused(small_store: Path, tmp_path: Path) -> None:
    """It changes nothing there. When the first is killed, its lock is gone with it."""
    arguments = [f"store.path={small_store}", "student.layers=1", "batch.samples=4", "output=out"]
    arguments += ["evaluation.samples=0", "checkpoint_every=1000", "batch.readers=1"]
    first = subprocess.Popen(command(2, [*arguments, "optimizer.steps=5000"]), cwd=tmp_path, env=environment())
    wait_for(lambda: has(tmp_path / "out" / "metrics.jsonl", '"loss"'))
    running = children(first.pid)
    for process in running:
        os.kill(process, signal.SIGSTOP)  # so that nothing changes by itself
    before = tree(tmp_path / "out")
    second = train(tmp_path, 1, *arguments, "optimizer.steps=3", "log_dir=other")
    assert second.returncode == 2
    assert second.stderr.count("error: output: another run is writing out; wait for it, or stop it") == 1
    assert "Traceback" not in second.stderr
    assert tree(tmp_path / "out") == before
    for process in [*running, first.pid]:
        os.kill(process, signal.SIGKILL)
    first.communicate()
    third = train(tmp_path, 1, *arguments, "optimizer.steps=3", "log_dir=other")
    assert third.returncode == 0, third.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]


def test_bad_input_ends_with_one_line(small_store: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (["optimizer.learning_rat=1"], "unknown key optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        (["store.path=nowhere.zarr"], "store.path: found no store at "),
        ([f"store.path=[{small_store},nowhere.zarr]"], f"store.path: found no store at {tmp_path / 'nowhere.zarr'}"),
        (
            [f"store.path={small_store}", "store.weights=[1,2]"],
            f"store.weights: expected a number > 0 for each of {small_store}",
        ),
        ([f"store.path={small_store}", "loss.temperature=4"], "loss.temperature: expected one of [1.0, 2.0]"),
        (
            [f"store.path={small_store}", "loss.divergence=on_policy", "loss.max_ratio=2"],
            "loss.max_ratio: expected sampled_logprob in ",
        ),
    ):
        ran = train(tmp_path, 1, *arguments)
        assert ran.returncode == 2
        assert told in ran.stderr
        assert "Traceback" not in ran.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    ran = train(tmp_path, 1, f"store.path={small_store}", "output=mine")
    assert ran.returncode == 2
    assert "output: expected a new or empty folder, or one of an earlier run, found other files in mine" in ran.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_damaged_store_is_named(small_store: Path, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "bad.zarr")
    shard = tmp_path / "bad.zarr" / "target_ids" / "c" / "3" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    ran = train(tmp_path, 1, "store.path=bad.zarr", "evaluation.samples=0", "batch.window_blocks=1000")
    assert ran.returncode == 2
    assert re.search(r"^error: .*bad\.zarr: damaged: target_ids, block 3: ", ran.stderr, re.MULTILINE)
    assert "Traceback" not in ran.stderr


def test_nothing_left_to_train_on(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))[:10]
    with pytest.raises(ConfigError, match=r"evaluation\.samples: expected fewer than the 10 samples"):
        split(cache, TrainConfig())


def test_the_schedule() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    settings = OptimizerConfig(learning_rate=1.0, warmup=0.1, weight_decay=0.5)
    optimizer, scheduler = optimizer_of(module, settings, 100)
    decays = {weight.ndim: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decays == {1: 0.0, 2: 0.5}
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1)
