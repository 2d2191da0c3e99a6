"""Memory and time of the loss, forward and backward: in chunks of rows, beside the whole logits at once.

    python -m tests.benchmarks.loss_memory [rounds=3] [tokens=4096] [hidden=576] [vocabulary=49152] [k=64]

chunked   DistillationLoss().from_hidden: head, softmax and KL for 1024 rows at a time, the head once more going back
on_policy DistillationLoss("on_policy").from_hidden, the same way
naive     logits [N, V] of all rows in float32, log_softmax, gather, KL with the tail's bucket, as it is written today

Each way in a process of its own, in turn, `rounds` times; medians of the ratios. All is float32, with gradients to the
hidden states and to the head; loss and gradients of naive and chunked are the same, which is checked. The peak is what
is needed beyond the inputs and the program: on a CPU of the resident set, on a GPU (taken if there is one)
torch.cuda.max_memory_allocated.
The fused losses of liger-kernel are no third way: they want the teacher's logits or hidden states in full, and a store
does not hold them.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from distill import DistillationLoss
from distill.reading.samples import Batch
from distill.student.divergence import Target

DEFAULTS = {"rounds": 3, "tokens": 4096, "hidden": 576, "vocabulary": 49152, "k": 64}


def naive(logits: Tensor, target: Target) -> Tensor:
    """KL(p || q) over the kept ids and the rest, summed over rows."""
    logprobs = torch.log_softmax(logits, dim=1)
    kept = logprobs.gather(1, target.ids)
    rest = torch.log1p(-kept.exp().sum(dim=1).clamp(max=1 - 1e-6))
    assert target.tail is not None
    of_kept = (target.logprobs.exp() * (target.logprobs - kept)).sum(dim=1)
    return (of_kept + target.tail.exp() * (target.tail - rest)).sum()


def inputs(sizes: dict[str, int], device: torch.device) -> tuple[Tensor, torch.nn.Linear, Batch]:
    """Hidden states [1, N, H], a head, and a teacher's rows."""
    torch.manual_seed(0)
    n, k = sizes["tokens"], sizes["k"]
    hidden = torch.randn(1, n, sizes["hidden"], device=device, requires_grad=True)
    head = torch.nn.Linear(sizes["hidden"], sizes["vocabulary"], bias=False, device=device)
    logprobs = torch.log_softmax(torch.randn(1, n, k + 1).sort(dim=2, descending=True).values, dim=2)
    first, step = torch.randint(sizes["vocabulary"], (1, n, 1)), sizes["vocabulary"] // k
    batch = {
        "target_ids": (first + step * torch.arange(k)) % sizes["vocabulary"],  # all different
        "target_logprobs": logprobs[..., :-1],
        "tail_logprob": logprobs[..., -1:],
        "logsumexp": torch.zeros(1, n, 1),
        "next_tokens": torch.randint(sizes["vocabulary"], (1, n)),
        "next_logprob": -5 * torch.rand(1, n),
        "loss_mask": torch.ones(1, n, dtype=torch.bool),
    }
    return hidden, head, Batch({name: values.to(device) for name, values in batch.items()})


def measure(way: str, sizes: dict[str, int]) -> dict[str, float]:
    """One forward and backward pass: peak MiB, seconds, and what came out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, head, batch = inputs(sizes, device)
    loss = DistillationLoss("on_policy" if way == "on_policy" else "forward_kl")
    if device.type == "cuda":  # the first pass initialises libraries; on a CPU it would be the peak
        run(way, loss, hidden, head, batch).backward()
        hidden.grad, head.weight.grad = None, None
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib(device)
    began = time.perf_counter()
    value = run(way, loss, hidden, head, batch)
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - began, peak_mib(device) - before
    assert hidden.grad is not None
    assert head.weight.grad is not None
    gradients = float(hidden.grad.norm()) + float(head.weight.grad.norm())
    return {"MiB": peak, "seconds": seconds, "loss": float(value), "gradients": gradients}


def run(way: str, loss: DistillationLoss, hidden: Tensor, head: torch.nn.Linear, batch: Batch) -> Tensor:
    """The forward pass."""
    if way != "naive":
        return loss.from_hidden(hidden, head, batch, [1.0])
    rows = {name: values[0] for name, values in batch.items()}
    return naive(head(hidden)[0].float(), loss.target(rows, [1.0], head.out_features))


def peak_mib(device: torch.device) -> float:
    """The most memory that was in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str]) -> None:
    """Run all in turn, print each round, then the medians."""
    if arguments[:1] == ["measure"]:
        print(json.dumps(measure(arguments[1], json.loads(arguments[2]))))
        return
    sizes = DEFAULTS | {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
    found: dict[str, list[dict[str, Any]]] = {"naive": [], "chunked": [], "on_policy": []}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{sizes}, float32, torch {torch.__version__}, {where}")
    for number in range(sizes["rounds"]):
        for way, results in found.items():
            command = [sys.executable, "-m", "tests.benchmarks.loss_memory", "measure", way, json.dumps(sizes)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(
                f"round {number + 1}: {way} {results[-1]['MiB']:,.0f} MiB, {results[-1]['seconds']:.2f} s", flush=True
            )
    for quantity in ("loss", "gradients"):
        assert abs(found["naive"][0][quantity] / found["chunked"][0][quantity] - 1) < 1e-3, (quantity, found)
    for quantity in ("MiB", "seconds"):
        for way in ("chunked", "on_policy"):
            pairs = zip(found["naive"], found[way], strict=True)
            ratios = [ours[quantity] / plain[quantity] for plain, ours in pairs]
            spread = f"from {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{quantity}: {way} is {statistics.median(ratios):.2f}x naive ({spread})")


if __name__ == "__main__":
    main(sys.argv[1:])
