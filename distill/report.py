"""Write a report of a store, and of students that learned from it: one HTML file, to be opened in any browser.

    python -m distill.report outputs/demo.zarr                                             # writes report.html
    python -m distill.report outputs/demo.zarr outputs/text_only outputs/distilled --teacher -o outputs/report.html

What the store is, plots of it, and samples of it token by token: how surprised the teacher was, and what it expected.
Of students, the folders of training runs: their held-out figures, what they make of a few beginnings before and after
their training, and where they differ most from the teacher. They are loaded for that.

-o FILE    where to write; report.html if it is left out. The folder is made
--teacher  let the teacher continue the same beginnings as the students; it is loaded too, in float32. teacher.model:
           where it is now, if not where it was

Code that comes with a model, or with a student's folder, runs with teacher.trust_remote_code=true only.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.config.generate import GenerateConfig
from distill.errors import ConfigError, DistillError, UserError
from distill.run.log import adapt_to_machine
from distill.settings import expand, load, split

_USAGE = (
    "usage: python -m distill.report STORE [STUDENT_FOLDER ...] [-o report.html] [--teacher] [CONFIG.yaml ...] "
    "[store.options.KEY=VALUE ...]"
)
_OF_TEACHERS = ("teacher.model", "teacher.trust_remote_code")


def main(arguments: Sequence[str]) -> int:
    """Write the report that is asked for; return the exit status: 0, 1 failed, 2 bad usage or input."""
    adapt_to_machine()
    if {"--help", "-h"} & {*arguments}:
        print(f"{_USAGE}\n\n{__doc__}")
        return 0
    try:
        report(arguments)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def report(arguments: Sequence[str]) -> None:
    """Write the report that these command-line arguments ask for, and say where it is.

    Raises DistillError as its parts do: for what is not a store, or not a training run of it; where files fail.
    """
    rest, file = _output(arguments)
    settings, others = split(rest, "store.options", *_OF_TEACHERS)
    if strange := [one for one in others if one.startswith("-") and one != "--teacher"]:
        raise ConfigError(f"unknown option {strange[0]}; {_USAGE}")
    paths = [expand(one, "STORE") for one in others if one != "--teacher"]
    if not paths:
        raise ConfigError(f"expected a store, found none; {_USAGE}")
    store_path, folders = paths[0], [Path(path) for path in paths[1:]]
    with_teacher, config = "--teacher" in others, load(GenerateConfig, settings)
    if with_teacher and not folders:
        raise ConfigError(f"--teacher: expected the folders of students, whose beginnings it continues; {_USAGE}")
    if config.teacher.model != GenerateConfig().teacher.model and not with_teacher:
        raise ConfigError(f"teacher.model: expected --teacher with it, found none; {_USAGE}")
    if twice := {folder.name for folder in folders if [one.name for one in folders].count(folder.name) > 1}:
        raise ConfigError(f"expected students' folders of different names, found {min(twice)} twice")
    # Imported here: they take seconds, which --help should not.
    from distill.page import figures
    from distill.page.html import Page
    from distill.page.look import look
    from distill.page.students import read_student, watch
    from distill.reading.cache import TeacherCache
    from distill.store.location import refuse_inside_store
    from distill.store.store import Store
    from distill.teacher.source import local_tokenizer
    from distill.teacher.summary import description, human

    figures.check_installed()
    options = config.store.options
    moved = None if config.teacher.model == GenerateConfig().teacher.model else config.teacher.model
    cache = TeacherCache(store_path, options)
    students = [read_student(folder, cache) for folder in folders]
    _check_writable(file)
    refuse_inside_store(file.absolute().parent, "-o")
    store, teacher = Store.existing(store_path, options), cache.attributes["teacher"]
    title = store_path.rstrip("/").rpartition("/")[2]
    page = Page(local_tokenizer(teacher["model"], teacher["revision"]), cache.attributes["method"])
    lead = f"what {teacher['model']} says of {len(cache):,} samples"
    page.head(title, lead, *description(store))
    seen = look(cache)
    if students:
        trusted = config.teacher.trust_remote_code
        watched = watch(students, cache, with_teacher, moved, trusted, lambda what: print(f"asking {what}"))
        page.students(students, watched)
    page.tokens(seen)
    page.store(seen)
    page.save(f"{title} - distill", file)
    print(f"report  {file} ({human(file.stat().st_size)}), for any browser")


def _output(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """The other arguments, and the file to write. Raises ConfigError where none follows -o."""
    rest = list(arguments)
    if "-o" not in rest:
        return rest, Path("report.html")
    at = rest.index("-o")
    if at + 1 == len(rest):
        raise ConfigError(f"-o: expected a file to write, found nothing; {_USAGE}")
    if "://" in rest[at + 1]:
        raise ConfigError(f"-o: expected a local file, found the URL {rest[at + 1]}")
    return [*rest[:at], *rest[at + 2 :]], Path(expand(rest[at + 1], "-o"))


def _check_writable(file: Path) -> None:
    """Raise ConfigError where `file` could not be written, before minutes are spent on it."""
    at = file.absolute().parent
    try:
        while not at.exists():
            at = at.parent
        other = file.is_symlink() or (file.exists() and not file.is_file())  # it is written anew, and put in its place
        possible = not other and at.is_dir() and os.access(at, os.W_OK | os.X_OK)
    except OSError:  # too long a name
        possible = False
    if not possible:
        raise ConfigError(f"-o: expected a file that can be written, found {file}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
