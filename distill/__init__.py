"""Offline knowledge distillation of language models: run the teacher once, keep what it said, train from that."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.reading.cache import TeacherCache as TeacherCache
    from distill.reading.samples import collate as collate
    from distill.student.learner import Learner as Learner
    from distill.student.loss import DistillationLoss as DistillationLoss

__version__ = "0.1.0"
__all__ = ["DistillationLoss", "Learner", "TeacherCache", "__version__", "collate"]

_HOMES = {
    "TeacherCache": "distill.reading.cache",
    "collate": "distill.reading.samples",
    "Learner": "distill.student.learner",
    "DistillationLoss": "distill.student.loss",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and zarr take seconds, which --help should not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
