"""launch/slurm.sbatch under a real SLURM: a controller and two nodes on this machine, on loopback."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.config.generate import GenerateConfig
from distill.settings import load
from tests.processes import committed
from tests.support import environment, generate, has, tree, wait_for

SBATCH = Path(__file__).parent.parent / "launch" / "slurm.sbatch"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in NEEDED),
        reason="needs SLURM and root: apt-get install slurm-wlm munge",
    ),
]


class Cluster:
    """A running SLURM and the way to submit to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
        self.environment = {**environment(), "SLURM_CONF": str(root / "slurm.conf"), "PATH": path}

    def run(self, *command: str, folder: Path | None = None) -> str:
        """The output of a command of SLURM's."""
        ran = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, (command, ran.stderr)
        return ran.stdout

    def submit(self, folder: Path, *arguments: str) -> str:
        """sbatch the file as it is, on two nodes of one core; the job's number."""
        options = ["--nodes=2", "--cpus-per-task=1", "--parsable"]
        return self.run("sbatch", *options, str(SBATCH), *arguments, folder=folder).strip()

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, ..."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait(self, job: str, *states: str) -> None:
        """Until the job is in one of the states; a job that is queued again starts at once."""
        deadline = time.monotonic() + 240
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, state
            if state == "PENDING":
                time.sleep(2)  # a job queued again in the second in which it was killed counts as killed
                subprocess.run(
                    ["scontrol", "update", f"JobId={job}", "StartTime=now"],
                    env=self.environment, capture_output=True, check=False,
                )  # fmt: skip
            time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """munge, a controller and two nodes, all with their own keys, sockets and ports."""
    root = tmp_path_factory.mktemp("slurm")
    root.chmod(0o755)
    for folder in (root, *root.parents):
        if folder.owner() == "root" and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o755)  # munge looks at the way to its socket
    (root / "key").write_bytes(secrets.token_bytes(1024))
    (root / "key").chmod(0o400)
    ports = 20000 + os.getpid() % 10000
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports + i} CPUs=2 RealMemory=8000 State=UNKNOWN"
        for i in (1, 2)
    )
    (root / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
""")
    found = Cluster(root)
    for name in ("state", "spool-n1", "spool-n2"):
        (root / name).mkdir()
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    found.run("munged", "--force", *(f"--{option}={root / name}" for option, name in files.items()))
    found.run("slurmctld", "-c")
    for node in ("n1", "n2"):
        found.run("slurmd", "-N", node)
    try:
        wait_for(
            lambda: found.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], lambda: found.run("sinfo")
        )
        yield found
    finally:
        for file in root.glob("*.pid"):
            subprocess.run(["kill", file.read_text().strip()], check=False)


def settings(model: Path, texts: Path) -> list[str]:
    found = [f"teacher.model={model}", f"dataset.path={texts}", "dataset.max_length=128", "capture.k=8"]
    return [*found, "store.path=x.zarr", "store.block_rows=256", "batch.max_tokens=256"]


def console(folder: Path, job: str) -> str:
    return (folder / f"distill-{job}.out").read_text()


def test_two_nodes_are_preempted_and_go_on(
    cluster: Cluster, model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Signalled as before the end of its time, queued again, done: the bytes are those of an undisturbed run."""
    arguments = settings(model_folder("llama"), texts(100))
    job = cluster.submit(tmp_path, "distill.generate", *arguments)
    began = lambda: any(has(log, "is committed") for log in (tmp_path / "logs" / job).glob("worker_0*"))  # noqa: E731
    wait_for(lambda: committed(tmp_path / "x.zarr") >= 3 and began(), lambda: console(tmp_path, job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    said = console(tmp_path, job)
    assert cluster.state(job) == "COMPLETED", said
    assert "restart 0: 2 node(s) of 1 worker(s): distill.generate" in said
    (resolved,) = tmp_path.rglob("config.yaml")
    assert resolved == tmp_path / "logs" / job / "config.yaml"
    assert load(GenerateConfig, [str(resolved)]) == load(GenerateConfig, [*arguments, f"log_dir=logs/{job}"])
    assert "stopped by SIGTERM at" in said
    assert "queued again" in said
    assert "restart 1: 2 node(s)" in said
    there = re.search(r"(\d+) of \d+ blocks are there", said.rpartition("restart 1")[2])
    assert there is not None
    assert int(there[1]) >= 3
    (tmp_path / "undisturbed").mkdir()
    ran = generate(tmp_path / "undisturbed", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert tree(tmp_path / "x.zarr") == tree(tmp_path / "undisturbed" / "x.zarr")
    assert json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]["complete"] is True


def workers_in(folder: Path) -> list[int]:
    """Processes of distill.generate's workers that run in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[1:4] == [b"-u", b"-m", b"distill.generate"] and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def test_a_killed_worker_a_cancelled_job_and_the_end(
    cluster: Cluster, model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """The killed worker's log reaches the job's output; a cancelled job goes on when it is submitted again."""
    arguments = settings(model_folder("llama"), texts(100))

    def begin() -> str:
        before, job = committed(tmp_path / "x.zarr"), cluster.submit(tmp_path, "distill.generate", *arguments)
        wait_for(lambda: committed(tmp_path / "x.zarr") >= before + 3, lambda: console(tmp_path, job))
        return job

    job = begin()
    os.kill(workers_in(tmp_path)[0], signal.SIGKILL)
    cluster.wait(job, "FAILED", "COMPLETED")
    assert cluster.state(job) == "FAILED"
    assert re.search(
        r"worker \d failed; the end of its log, .*/logs/\d+/worker_\d.[^/]*.log:\n", console(tmp_path, job)
    )
    job = begin()
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", "COMPLETED")
    assert cluster.state(job) == "CANCELLED"
    assert "stopped by SIGTERM at" in console(tmp_path, job)
    job = cluster.submit(tmp_path, "distill.generate", *arguments)
    cluster.wait(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", console(tmp_path, job)
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True


def test_training_is_preempted_and_goes_on(cluster: Cluster, small_store: Path, tmp_path: Path) -> None:
    arguments = [f"store.path={small_store}", "student.layers=1", "optimizer.steps=60", "batch.samples=4"]
    arguments += ["batch.readers=0", "evaluation.samples=20", "checkpoint_every=1000", "output=student"]
    job = cluster.submit(tmp_path, "distill.train", *arguments)
    wait_for(lambda: has(tmp_path / "student" / "metrics.jsonl", '"loss"'), lambda: console(tmp_path, job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    said = console(tmp_path, job)
    assert cluster.state(job) == "COMPLETED", said
    told = re.search(r"a checkpoint of step (\d+) is there", said)
    assert told is not None, said
    assert f"from step {told[1]} of 60" in said
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_of_an_array_of_jobs_one_writes_a_store(
    cluster: Cluster, model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """The other is told why it cannot, and changes nothing."""
    arguments = settings(model_folder("llama"), texts(300))
    options = ["--array=0-1", "--nodes=1", "--cpus-per-task=1", "--parsable"]
    job = int(cluster.run("sbatch", *options, str(SBATCH), "distill.generate", *arguments, folder=tmp_path))
    jobs = [f"{job}_{task}" for task in range(2)]
    for task in jobs:
        cluster.wait(task, "COMPLETED", "FAILED")
    said = {log.name: log.read_text() for log in tmp_path.glob("distill-*.out")}
    assert sorted(cluster.state(task) for task in jobs) == ["COMPLETED", "FAILED"], said
    told = [text for text in said.values() if re.search(r"error: store.path: another run (is writing|has begun)", text)]
    assert len(said) == 2
    assert len(told) == 1, said
    assert json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]["complete"] is True


@pytest.mark.parametrize("arguments", [[], ["distill.generate"]])
def test_without_slurm_or_arguments_it_says_how(arguments: list[str]) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    ran = subprocess.run(["bash", str(SBATCH), *arguments], env=outside, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: expected SLURM to run this")
    assert "--account=A --partition=P" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
