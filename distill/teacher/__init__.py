"""The teacher: find its files (`source`), load it and turn tokens into float32 logits, slice by slice (`model`)."""

from distill.teacher.model import Teacher, resolve_dtype
from distill.teacher.source import Source, locate

__all__ = ["Source", "Teacher", "locate", "resolve_dtype"]
