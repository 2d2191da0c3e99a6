"""The methods that are compared: the rows that each keeps of the teacher, and the loss of a student on them.

N rows, V vocabulary, K kept ids.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config.generate import CaptureConfig
from distill.student.divergence import Target, forward_kl
from distill.student.loss import DistillationLoss
from distill.teacher.capture import round_logprobs
from distill.teacher.method import capture
from distill.teacher.sample import uniforms

Rows = dict[str, Tensor]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """All but the part and the folder of the results. The model's folder, and the file of texts, may be anywhere."""

    device: str = "cpu"
    teacher: str = "demo"  # or a model's folder
    texts: str = ""  # a file of JSON lines; without it, CPython's help topics
    seeds: int = 3
    layers: int = 24  # of the students of part students
    heal: int = 40  # steps of cross-entropy from the teacher's layers to the common start
    steps: int = 16
    tokens: int = 512  # of a step
    length: int = 256  # tokens of a window
    held_out: int = 4096  # tokens
    lr: float = 1e-4
    processes: int = 2  # of one thread each; on a GPU there is one
    rows: int = 8192  # tokens of parts bytes and gradients
    gradient_layers: int = 21  # of the student of part gradients


@dataclass(frozen=True)
class Method:
    """A way to keep the teacher, and to learn from that. kind: full, text, topk, draws (with replacement) or varopt."""

    kind: str
    k: int = 0
    tail: str = "bucket"

    @property
    def kept(self) -> str:
        """What is on disk: methods that differ in their loss alone share it."""
        return {"topk": f"top-{self.k}", "draws": f"{self.k} draws", "varopt": f"VarOpt {self.k}"}.get(
            self.kind, self.kind
        )

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return f"{self.kept} {self.tail}" if self.kind == "topk" else self.kept


METHODS = (
    Method("full"),
    Method("text"),
    *(Method("topk", k, tail) for k in (16, 64) for tail in ("bucket", "renormalize", "ground_truth")),
    Method("draws", 50),
    *(Method("varopt", k) for k in (8, 16, 24, 32, 50, 128)),
)


@torch.inference_mode()
def rows_of(logits: Tensor, method: Method, next_ids: Tensor, seed: int, first_row: int) -> Arrays:
    """What is kept of a teacher's logits [N, V] float32 (left as they are), with a store's dtypes.

    next_ids: [N] int64. first_row: number of the first row in the store: draws follow from the seed and a row's number.
    """
    if method.kind in ("full", "text"):
        return {}
    if method.kind == "draws":
        state = int(np.random.SeedSequence([seed, first_row]).generate_state(1)[0])  # torch uses 32 bits of a seed
        random = torch.Generator(logits.device).manual_seed(state)
        drawn = torch.multinomial(logits.softmax(dim=1), method.k, replacement=True, generator=random)
        return {"target_ids": drawn.sort(dim=1).values.int().cpu().numpy()}
    u = torch.from_numpy(uniforms(seed, first_row, len(logits))).to(logits.device)
    settings = CaptureConfig("topk" if method.kind == "topk" else "sample", method.k)
    found = capture(logits.clone(), settings, next_ids, u)
    assert found is not None
    return {
        "target_ids": found.target_ids.cpu().numpy(),
        "target_logprobs": round_logprobs(found.target_logprobs.cpu().numpy()),
        "logsumexp": found.logsumexp.cpu().numpy(),
        "tail_logprob": round_logprobs(found.tail_logprob.cpu().numpy()),
    }


def as_read(rows: Arrays, next_ids: Tensor) -> Rows:
    """The same rows as batches have them, on the device of next_ids [N]."""
    read = {name: torch.from_numpy(values).to(next_ids.device) for name, values in rows.items()}
    read = {name: values.long() if name == "target_ids" else values.float() for name, values in read.items()}
    return read | {"next_tokens": next_ids}


def losses(method: Method, logits: Tensor, rows: Rows, teacher_logits: Tensor) -> Tensor:
    """[N]: the loss of each row of a student's logits [N, V]. teacher_logits: [N, V], for kind full only."""
    if method.kind == "full":
        return full_kl(logits.float(), teacher_logits)
    if method.kind == "draws":
        drawn = rows["target_ids"]
        each = torch.full(drawn.shape, -math.log(method.k), device=drawn.device)
        return forward_kl(logits.float(), Target(drawn, each))
    loss = DistillationLoss(alpha=0.0) if method.kind == "text" else DistillationLoss(tail=method.tail)
    return loss.per_row(logits, rows, [1.0])


def full_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[N]: KL(p || q) over the whole vocabulary, from logits [N, V] in float32."""
    log_p = teacher_logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - logits.log_softmax(dim=1))).sum(dim=1)


def expected_ids(rows: Arrays) -> float:
    """Different ids kept in a row, on average."""
    ids = np.sort(rows["target_ids"], axis=1)
    return float(((ids[:, 1:] != ids[:, :-1]).sum(axis=1) + 1 - (ids[:, 0] < 0)).mean())
