"""What is done before the student writes: it is found, the prompts are read, and worker 0 tells what is missing."""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill import __version__
from distill.config.generate import TeacherConfig
from distill.config.rollout import RolloutConfig
from distill.data.asked import turn_end
from distill.errors import ConfigError, TeacherError
from distill.rollouts.parts import Parts
from distill.rollouts.prompts import Prompts, Reader
from distill.rollouts.sampling import stop_ids
from distill.rollouts.summary import summary
from distill.run.board import Board
from distill.run.grid import Grid
from distill.settings import to_yaml
from distill.store.location import Lock, refuse_inside_store
from distill.student.checkpoint import lock_output
from distill.teacher.loading import load as load_model
from distill.teacher.model import resolve_dtype, slice_bytes
from distill.teacher.placement import Needs, Placement
from distill.teacher.source import Source, locate

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """What there is to do, the same for all workers.

    missing: the parts that are not there yet, of all workers
    stops:   the ids that end a rollout
    lock:    of the folder, which worker 0 holds
    """

    parts: Parts
    prompts: Prompts
    missing: list[int]
    stops: list[int]
    lock: Lock | None

    def rollouts(self, config: RolloutConfig) -> tuple[int, int]:
        """How many there will be, and how many are there."""
        size, count = config.batch.part_prompts, len(self.prompts)
        missing = sum(min(count, (part + 1) * size) - part * size for part in self.missing)
        return config.sampling.n * count, config.sampling.n * (count - missing)


def find(config: RolloutConfig) -> Source:
    """The student's files. Raises ConfigError where they cannot be found."""
    with of_student(config):
        return locate(TeacherConfig(device=config.device, **vars(config.student)))


def load(config: RolloutConfig, source: Source, device: torch.device) -> Any:
    """The student in eval mode on its device. Raises ConfigError where it cannot be loaded.

    On a GPU this process attends without cuDNN: of keys that were kept its sums differ from run to run.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    with of_student(config):
        needs = Needs.of(source, resolve_dtype(source, device), 1, slice_bytes(device))
        return load_model(source, device, Placement(), needs, None, Path(config.log_dir))[0]


def plan_job(config: RolloutConfig, grid: Grid, board: Board, source: Source, device: torch.device) -> Job | None:
    """Worker 0 reads the prompts, or finds what an earlier start has left, and tells the others. None: all is there.

    Raises UserError, also where this worker does not see the folder that worker 0 has made.
    """
    output = Path(config.output)
    if grid.rank > 0:
        if not (note := board.wait("job")):
            return None
        parts = Parts(output)
        if parts.manifest is None:
            raise ConfigError(f"output: worker 0 began {output}, worker {grid.rank} does not see it")
        missing, stops = json.loads(note)
        return Job(parts, parts.prompts(), missing, stops, None)
    refuse_inside_store(output, "output")
    lock = lock_output(output)
    parts, reader = Parts(output), Reader(config.prompts, source)
    stops = stop_ids(source, config.sampling.stop)
    settings = settings_of(config, source, reader, stops, device)
    if parts.manifest is not None:
        parts.check(settings)
    parts.clean()
    if parts.manifest is None:
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyarrow")}
        parts.keep(
            reader.read(source.context_length), config.batch.part_prompts, rollouts_of_a_prompt=config.sampling.n,
            student=config.student.model, tokenizer=source.vocabulary, config=settings,
            versions={"distill": __version__, **packages},
        )  # fmt: skip
    missing = parts.missing()
    if not missing:
        board.note("job", "")
        logger.info("%s is complete already: nothing to do", output)
        logger.info(summary(parts, config))
        return None
    (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
    _say(config, grid, source, parts, missing, stops)
    board.note("job", json.dumps([missing, stops]))
    return Job(parts, parts.prompts(), missing, stops, lock)


def settings_of(
    config: RolloutConfig, source: Source, reader: Reader, stops: list[int], device: torch.device
) -> dict[str, Any]:
    """What the rollouts follow from, as a flat mapping: settings, and the contents of files.

    batch.sequences is not among them: it changes rounding only, and a run that lacks memory may go on with fewer.
    """
    read_as = {"path", "data_files", "chat_template"}  # their contents are in the reader's identity
    return {
        **{name.replace("teacher", "student"): value for name, value in source.fingerprint.items()},
        "student.dtype": str(resolve_dtype(source, device)).removeprefix("torch."),
        "student.attn_implementation": config.student.attn_implementation,
        **reader.identity,
        **{f"prompts.{name}": value for name, value in vars(config.prompts).items() if name not in read_as},
        **{f"sampling.{name}": value for name, value in vars(config.sampling).items() if name != "stop"},
        "sampling.stop": stops,
        "batch.part_prompts": config.batch.part_prompts,
    }


def _say(config: RolloutConfig, grid: Grid, source: Source, parts: Parts, missing: list[int], stops: list[int]) -> None:
    """What will be done, in lines of worker 0's."""
    assert parts.manifest is not None
    names = [repr(name) for name in source.tokenizer.convert_ids_to_tokens(stops)]
    logger.info("student: %s, ends with %s", config.student.model, ", ".join(names) or "no token")
    total = parts.manifest["parts"]
    logger.info("%d of %d parts of %d prompts are there", total - len(missing), total, config.batch.part_prompts)
    if len(missing) < grid.world_size:
        logger.warning(
            "%d of %d workers have nothing to do: smaller parts (batch.part_prompts) are for more workers",
            grid.world_size - len(missing), grid.world_size,
        )  # fmt: skip
    end = turn_end(source.tokenizer)
    if end is not None and end not in stops and bool((parts.prompts().tokens == end).any()):
        token = source.tokenizer.convert_ids_to_tokens(end)
        logger.warning("the chat template ends a turn with %r, which ends no rollout: sampling.stop=[%d]", token, end)
    if not stops:
        logger.warning("no token ends a rollout: each has max_new_tokens; sampling.stop names some")


@contextlib.contextmanager
def of_student(config: RolloutConfig) -> Iterator[None]:
    """Errors of a teacher name the keys of a student."""
    try:
        yield
    except TeacherError as error:
        text = str(error).replace("teacher.model", f"student.model={config.student.model}", 1)
        raise ConfigError(text.replace("teacher.", "student.")) from error
