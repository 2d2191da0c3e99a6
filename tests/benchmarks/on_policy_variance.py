"""How noisy the gradient of on_policy is beside those that see the teacher's top-k, on the same rollouts.

    python -m tests.benchmarks.on_policy_variance [rollouts=64] [tokens=32] [layers=28] [trained=4] [k=64] [seed=0]

Teacher: the demo's, SmolLM2-135M-Instruct. Student: `layers` of its 30 layers. Each rollout goes on from 24 tokens of a
text of the demo, at temperature 1. The gradient g of the mean loss over a rollout's tokens is taken with respect to the
weights of the student's last `trained` layers. Two things make it noisy: which prefixes the student came to, and, with
on_policy, which tokens it drew there. E g, over the token that is drawn after each prefix, is known exactly, as both
models are at hand. Over rollouts:

signal    squared norm of the mean of g, without what noise adds to it; of the means E g, which are less noisy
noise     variance of g, summed over weights: that of E g, and
drawn     of it, the mean of |g - E g|^2: what the drawn tokens alone add
rollouts  noise / signal: in the mean over so many rollouts there is as much noise as signal
degrees   between the mean of E g and that of reverse KL over the whole vocabulary: what is biased
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from distill import DistillationLoss
from distill.student.model import evenly_spaced, shortened
from distill.teacher.demo import folder

DEFAULTS = {"rollouts": 64, "tokens": 32, "layers": 28, "trained": 4, "k": 64, "seed": 0}
PROMPT = 24
WAYS = {
    "reverse_kl, whole vocabulary": None,
    "reverse_kl, top-k": DistillationLoss("reverse_kl"),
    "jensen_shannon, top-k": DistillationLoss("jensen_shannon"),
    "on_policy": DistillationLoss("on_policy"),
    "on_policy, max_advantage=2": DistillationLoss("on_policy", max_advantage=2.0),
}


def prompts(tokenizer: Any, count: int) -> Tensor:
    """[count, PROMPT]: the beginnings of parts of the demo's texts."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics.values()))["input_ids"]
    starts = [i * (len(ids) // count) for i in range(count)]
    return torch.tensor([ids[start : start + PROMPT] for start in starts])


def rows_of(logits: Tensor, following: Tensor, k: int) -> dict[str, Tensor]:
    """What a store of top-k would hold of the teacher's logits [T, V], unrounded."""
    logprobs = logits.log_softmax(dim=1)
    top = logprobs.topk(k, dim=1)
    outside = logprobs.scatter(1, top.indices, -torch.inf).logsumexp(dim=1, keepdim=True)
    rows = {"target_ids": top.indices, "target_logprobs": top.values, "tail_logprob": outside}
    rows |= {"logsumexp": logits.logsumexp(dim=1, keepdim=True), "next_tokens": following}
    return rows | {"next_logprob": logprobs.gather(1, following[:, None])[:, 0]}


def loss_of(way: DistillationLoss | None, logits: Tensor, teachers: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """The mean over rows; None is KL(q || p) over all ids."""
    return expected(math.inf, logits, teachers) if way is None else way.per_row(logits, rows, [1.0]).mean()


def expected(bound: float, logits: Tensor, teachers: Tensor) -> Tensor:
    """The mean over rows of what has the gradient of on_policy in the mean over the drawn token; all ids are summed."""
    log_q = logits.log_softmax(dim=1)
    difference = (log_q - teachers.log_softmax(dim=1)).detach().clamp(-bound, bound)
    return (log_q.detach().exp() * difference * log_q).sum(dim=1).mean()


class Spread:
    """Means and variances of vectors that are too many to be kept."""

    def __init__(self) -> None:
        self.count, self.total, self.squares, self.drawn = 0, torch.zeros(()), 0.0, 0.0

    def add(self, found: Tensor, mean: Tensor) -> None:
        """g and E g of a rollout."""
        self.count, self.total = self.count + 1, self.total + mean.double()
        self.squares += float(mean.double().square().sum())
        self.drawn += float((found - mean).double().square().sum())

    def figures(self, reference: Tensor) -> dict[str, float]:
        """As the header of this file says. reference: a vector."""
        mean, drawn = self.total / self.count, self.drawn / self.count
        of_prefixes = (self.squares - self.count * float(mean.square().sum())) / (self.count - 1)
        signal, noise = float(mean.square().sum()) - of_prefixes / self.count, of_prefixes + drawn
        cosine = float(mean @ reference / mean.norm() / reference.norm())
        degrees = math.degrees(math.acos(min(1.0, cosine)))
        return {"signal": signal, "noise": noise, "drawn": drawn, "rollouts": noise / signal, "degrees": degrees}


def gradient(value: Tensor, weights: list[Tensor]) -> Tensor:
    """With respect to some weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, weights, retain_graph=True)])


def main(arguments: list[str]) -> None:
    """Roll out, take the gradients, print a line for each way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = DEFAULTS | {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
    teacher = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()
    student = shortened(teacher, evenly_spaced(settings["layers"], teacher.config)).eval()
    student.requires_grad_(False)
    for layer in student.model.layers[-settings["trained"] :]:
        layer.requires_grad_(True)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    begun = prompts(AutoTokenizer.from_pretrained(folder()), settings["rollouts"])
    torch.manual_seed(settings["seed"])
    with torch.no_grad():
        ids = student.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=settings["tokens"], max_new_tokens=settings["tokens"], pad_token_id=0,
        )  # fmt: skip
    spreads = {name: Spread() for name in WAYS}
    kl = entropy = ratio = 0.0
    for number, sequence in enumerate(ids):
        inputs, following = sequence[None, :-1], sequence[PROMPT:]
        with torch.no_grad():
            teachers = teacher(input_ids=inputs).logits[0, PROMPT - 1 :]
        logits = student(input_ids=inputs).logits[0, PROMPT - 1 :]
        rows, log_q = rows_of(teachers, following, settings["k"]), logits.detach().log_softmax(dim=1)
        for name, way in WAYS.items():
            value = loss_of(way, logits, teachers, rows)
            found = gradient(value, trained)
            mean = found
            if way is not None and way.divergence == "on_policy":
                mean = gradient(expected(way.max_advantage or math.inf, logits, teachers), trained)
            spreads[name].add(found, mean)
        kl += float((log_q.exp() * (log_q - teachers.log_softmax(dim=1))).sum(dim=1).mean())
        ratio += float((log_q.gather(1, following[:, None])[:, 0] - rows["next_logprob"]).mean())
        entropy += float(torch.special.entr(log_q.exp()).sum(dim=1).mean())
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(ids)}", end="", file=sys.stderr)
    count = len(ids)
    print(f"{settings}, float32, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"reverse KL {kl / count:.3f}, by the drawn tokens {ratio / count:.3f}; entropy {entropy / count:.2f} nats")
    first = spreads[next(iter(WAYS))]
    reference = first.total / first.count
    for name, spread in spreads.items():
        figures = spread.figures(reference)
        print(f"{name:30}" + "".join(f"  {figure} {value:.4g}" for figure, value in figures.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
