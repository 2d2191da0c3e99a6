"""Students in a report: how they did on what was held out, where they still differ from the teacher, what they say.

T tokens of a sample, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from distill.config.train import StudentConfig, TrainConfig
from distill.errors import ConfigError, StoreError, first_line
from distill.reading.cache import TeacherCache
from distill.reading.samples import Sample, collate
from distill.settings import load
from distill.student import model as student_model
from distill.student.evaluate import divergences
from distill.student.metrics import evaluations, is_run

SHOWN_IDS = 5
_SAMPLES, _MOST_TOKENS, _DIFFERENCES = 8, 512, 10
_BEGINNINGS, _BEGINNING_TOKENS, _NEW_TOKENS = 2, 24, 32
_LONGEST_BEGINNING = 256


@dataclass(frozen=True)
class Difference:
    """A position where student and teacher differ: what was read, what really follows, and what both expect.

    divergence: KL(teacher || student) over the kept ids and the rest, nats
    teacher, student: ids with their probabilities; None: the store knows none (drawn)
    """

    sample: int
    context: list[int]
    following: int
    divergence: float
    teacher: list[tuple[int, float | None]]
    student: list[tuple[int, float]]


@dataclass
class Student:
    """A training run. lines: of its metrics with held-out figures. said: by when (before, after), each continuation."""

    name: str
    folder: Path
    config: TrainConfig
    lines: list[dict[str, Any]]
    said: dict[str, list[list[int]]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


@dataclass
class Seen:
    """What students were watched on. beginnings: what was continued; texts: what follows there in the samples.

    held_out: whether these samples were held out of every student's training. alike: whether all students held out the
    same. notes: what could not be shown, and why
    """

    held_out: bool
    alike: bool
    beginnings: list[list[int]]
    texts: list[list[int]]
    teacher: list[list[int]] | None = None
    notes: list[str] = field(default_factory=list)


def read_student(folder: Path, cache: TeacherCache) -> Student:
    """The training run in `folder`. Raises ConfigError where there is none, or it is not complete; StoreError where its
    tokenizer is another than the teacher's.
    """
    if not is_run(folder):
        raise ConfigError(f"expected the folder of a training run (distill.train's output), found none at {folder}")
    lines = evaluations(folder / "metrics.jsonl")
    if not lines:
        raise ConfigError(f"expected held-out figures in {folder / 'metrics.jsonl'}, found none")
    if not student_model.is_saved(folder):
        raise ConfigError(f"expected a finished training run, found one without its student at {folder}: go on with it")
    config = load(TrainConfig, [str(folder / "config.yaml")])
    try:
        cache.check_tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except StoreError as error:
        raise StoreError(f"{folder} did not learn from this store: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokenizer of {folder}: {first_line(error)}") from error
    return Student(folder.name, folder, config, lines)


def watch(
    students: Sequence[Student],
    cache: TeacherCache,
    with_teacher: bool,
    teacher: str | None = None,
    trusted: bool = False,
    heard: Callable[[str], object] = str,
) -> Seen:
    """Run the students, before and after their training, on a few held-out samples; fill in what they say.

    with_teacher: the teacher continues the same beginnings; it is loaded in float32. teacher: where it is now, if not
    where it was. trusted: code that comes with a model may run. heard: called before each model with what is done. All
    run on the GPU if there is one.
    Raises ConfigError where a student, or the teacher, cannot be loaded.
    """
    first = students[0].config
    settings = StudentConfig(model=teacher or "teacher", trust_remote_code=trusted)
    try:
        source = _source(settings, cache) if with_teacher else None
    except ConfigError as error:
        raise ConfigError(str(error).replace("student.", "teacher.")) from error
    _, held_out = cache.split(first.evaluation.samples, first.seed)
    alike = {(one.config.seed, one.config.evaluation.samples, _place(one.config.store.path)) for one in students}
    same = alike == {(first.seed, first.evaluation.samples, _place(cache.path))}
    samples = [held_out[i] for i in range(min(len(held_out), _SAMPLES))] or [
        cache[i] for i in range(min(len(cache), _SAMPLES))
    ]
    where = [_beginning(sample) for sample in samples]
    told = [(s, at) for s, at in zip(samples, where, strict=True) if 0 < at < len(s["tokens"])][:_BEGINNINGS]
    seen = Seen(
        len(held_out) > 0 and same,
        len(alike) == 1,
        [s["tokens"][max(0, at - _LONGEST_BEGINNING) : at].tolist() for s, at in told],
        [s["tokens"][at : at + _NEW_TOKENS].tolist() for s, at in told],
    )
    before: dict[tuple[StudentConfig, int], list[list[int]]] = {}
    for student in students:
        config = student.config
        start = replace(config.student, trust_remote_code=trusted)  # a folder that was passed on runs nothing
        kind = (start, config.seed)
        if kind not in before:
            heard(f"{student.name}, before its training")
            try:
                model = student_model.build(start, _source(start, cache), config.seed)
                before[kind] = _continued(model, seen.beginnings)
            except ConfigError as error:  # it may be elsewhere by now
                seen.notes.append(f"{student.name} before its training cannot be shown: {error}")
                before[kind] = []
        student.said["before"] = before[kind]
        heard(student.name)
        own = StudentConfig(model=str(student.folder.absolute()), trust_remote_code=trusted)  # demo is a word, too
        model = student_model.build(own, _source(own, cache), config.seed)
        student.said["after"] = _continued(model, seen.beginnings)
        student.differences = differences(model, samples, cache.temperatures)
    if source is not None:
        heard("the teacher")
        seen.teacher = _continued(student_model.build(settings, source, 0), seen.beginnings)
    return seen


def _place(path: str | list[str]) -> str:
    """Where a store is, or several are, however it was written."""
    if isinstance(path, list):
        return " ".join(map(_place, path))
    return path if "://" in path else str(Path(path).resolve())


def _source(config: StudentConfig, cache: TeacherCache) -> Any:
    return student_model.find(config, cache.attributes["teacher"])


def _beginning(sample: Sample) -> int:
    """How many tokens of a sample are a beginning to continue: those before the first that is learned from."""
    if "loss_mask" in sample:
        rows = sample["loss_mask"].nonzero()
        return int(rows[0]) + 1 if len(rows) else 0
    return _BEGINNING_TOKENS


def _on_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def _continued(model: Any, beginnings: Sequence[Sequence[int]]) -> list[list[int]]:
    """What a model makes of each beginning, greedily."""
    model = _on_device(model)
    settings = model.generation_config
    stop = settings.eos_token_id if settings.eos_token_id is not None else model.config.get_text_config().eos_token_id
    model.generation_config = GenerationConfig()
    found = []
    for beginning in beginnings:
        ids = torch.tensor([beginning], device=model.device)
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
        found.append(written[0, len(beginning) :].tolist())
    return found


@torch.inference_mode()
def differences(model: Any, samples: Sequence[Sample], temperatures: list[float]) -> list[Difference]:
    """The positions where a student differs most from the teacher, most first; of those less than 8 apart only one."""
    model = _on_device(model)
    found: list[tuple[float, Difference]] = []
    for sample in samples:
        batch = collate([sample])
        batch = type(batch)({name: values[:, :_MOST_TOKENS].to(model.device) for name, values in batch.items()
                             if name != "sample"})  # fmt: skip
        at = batch["loss_mask"][0].nonzero()[:, 0]
        if not len(at):
            continue
        logits = model(batch["input_ids"]).logits[0, at].float()
        rows = {name: values[0, at] for name, values in batch.items()}
        apart = divergences(logits, rows, temperatures)
        likely = logits.softmax(dim=1).topk(SHOWN_IDS, dim=1)
        taken: list[int] = []
        for i in apart.argsort(descending=True)[: 8 * _DIFFERENCES].tolist():
            row = int(at[i])
            if any(abs(row - other) < 8 for other in taken):
                continue
            taken.append(row)
            tokens = sample["tokens"].tolist()
            one = Difference(
                int(sample["sample"]), tokens[max(0, row - 40) : row + 1], tokens[row + 1], float(apart[i]),
                expected(sample, row),
                list(zip(likely.indices[i].tolist(), likely.values[i].tolist(), strict=True)),
            )  # fmt: skip
            found.append((one.divergence, one))
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])[:_DIFFERENCES]]


def expected(sample: Mapping[str, Any], row: int) -> list[tuple[int, float | None]]:
    """The ids that the teacher expects after token `row`, most probable first, at most five, with probabilities.

    None: the id was drawn, its probability is not kept.
    """
    pairs = zip(sample["target_ids"][row].tolist(), sample["target_logprobs"][row].exp().tolist(), strict=True)
    return [(i, None if math.isnan(p) else p) for i, p in pairs if i >= 0][:SHOWN_IDS]
