"""The teacher.

source     finds its files
placement  decides how a copy is spread over devices and workers
loading    loads the weights, or this worker's share of them
share      what a worker does differently that holds a part only; pipeline: the stages of a pipeline
model      turns tokens into float32 logits, slice by slice, and these into what is kept
"""

from distill.teacher.loading import load
from distill.teacher.model import Teacher, resolve_dtype, slice_bytes
from distill.teacher.placement import Needs, Placement, arithmetic, decide
from distill.teacher.source import Source, locate

__all__ = [
    "Needs",
    "Placement",
    "Source",
    "Teacher",
    "arithmetic",
    "decide",
    "load",
    "locate",
    "resolve_dtype",
    "slice_bytes",
]
