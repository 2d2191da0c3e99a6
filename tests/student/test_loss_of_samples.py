"""The loss on rows of which some ids were drawn."""

import pytest
import torch
from torch import nn

from distill.errors import ConfigError
from distill.student.evaluate import measured
from distill.student.loss import DistillationLoss
from distill.teacher.sample import uniforms
from tests.captured import sample, topk, weights
from tests.student.test_loss import TEMPERATURES, K, N, V, student_logits, teacher_rows


def sampled_rows(logits, k, seed=0):
    """The rows that a store of samples would hold of a teacher's logits [N, V], unrounded."""
    found = sample(logits.clone(), k, torch.from_numpy(uniforms(seed, 0, len(logits))))
    names = ("target_logprobs", "logsumexp", "tail_logprob")
    rows = {name: getattr(found, name).clone() for name in names}
    return rows | {"target_ids": found.target_ids.long(), "next_tokens": torch.arange(len(logits)) % 7}, found


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ground_truth"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_a_sampled_row_is_forward_kl_with_its_weights(tail, alpha):
    """Value and gradient against the dense formula in float64, whatever the tail, with rows of both methods."""
    teacher, top = teacher_rows()
    rows, found = sampled_rows(teacher, K)
    assert (rows["target_ids"] < 0).any()
    assert (rows["target_logprobs"].isnan() & (rows["target_ids"] >= 0)).any()
    student, expected = student_logits(), student_logits()
    loss = DistillationLoss(tail=tail, alpha=alpha)
    per_row = loss.per_row(student, rows, [1.0])
    w = weights(found)
    log_q = expected.double().log_softmax(dim=1)
    at = log_q.gather(1, found.target_ids.long().clamp(min=0))
    divergence = (torch.special.xlogy(w, w) - w * at).sum(dim=1)
    entropy = nn.functional.cross_entropy(expected.double(), rows["next_tokens"], reduction="none")
    plain = alpha * divergence + (1 - alpha) * entropy
    torch.testing.assert_close(per_row.double(), plain, atol=1e-5, rtol=1e-5)
    per_row.sum().backward()
    plain.sum().backward()
    torch.testing.assert_close(student.grad, expected.grad, atol=1e-5, rtol=1e-5)
    mixed = {name: torch.cat([values, top[name][:, : values[0].numel()] if values.dim() > 1 else top[name]])
             for name, values in rows.items()}  # fmt: skip
    both = loss.per_row(torch.cat([student, student]), mixed, [1.0])
    torch.testing.assert_close(both[:N], per_row, atol=1e-6, rtol=1e-6)
    alone = loss.per_row(student, {name: values[N:] for name, values in mixed.items()}, [1.0])
    torch.testing.assert_close(both[N:], alone, atol=1e-6, rtol=1e-6)


def test_the_mean_gradient_of_samples_is_that_of_the_whole_distribution():
    """At the Monte-Carlo rate: with four times as many seeds the error is about half."""
    teacher, _ = teacher_rows()
    full = student_logits()
    p = teacher.double().softmax(dim=1)
    (p * (p.log() - full.double().log_softmax(dim=1))).sum().backward()
    errors = []
    for trials in (500, 8000):
        student = student_logits().detach().repeat(trials, 1).requires_grad_()
        rows, _ = sampled_rows(teacher.repeat(trials, 1), 4, seed=trials)
        DistillationLoss().per_row(student, rows, [1.0]).sum().backward()
        mean = student.grad.view(trials, N, V).mean(dim=0)
        errors.append(float((mean - full.grad).norm()))
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.03
    biased = student_logits()
    top = topk(teacher.clone(), 4, [1.0], torch.zeros(N, dtype=torch.long))
    rows = {name: getattr(top, name).clone() for name in ("target_logprobs", "logsumexp", "tail_logprob")}
    rows |= {"target_ids": top.target_ids.long(), "next_tokens": torch.zeros(N, dtype=torch.long)}
    DistillationLoss(tail="renormalize").per_row(biased, rows, [1.0]).sum().backward()
    assert (biased.grad - full.grad).norm() > 10 * errors[1]


@pytest.mark.parametrize(
    "refused",
    [{"divergence": "reverse_kl"}, {"divergence": "jensen_shannon"}, {"temperature": 2.0, "tail": "renormalize"}],
)
def test_what_a_sample_cannot_say_is_refused(refused):
    teacher, top = teacher_rows()
    rows, _ = sampled_rows(teacher, K)
    loss = DistillationLoss(**refused)
    with pytest.raises(ConfigError, match="expected divergence forward_kl and temperature 1 with a store of"):
        loss.check_method("sample")
    with pytest.raises(ConfigError, match=r"capture\.method=sample"):
        loss.per_row(student_logits(), rows, [1.0])
    loss.check_method("topk")
    loss.per_row(student_logits(), top, TEMPERATURES)
    DistillationLoss(**refused, alpha=0.0).per_row(student_logits(), rows, [1.0])
    advice = r"capture\.k=64 capture\.temperatures=\[1\.0,2\] for that" if loss.temperature == 2 else r"k=64 for that"
    with pytest.raises(ConfigError, match=advice):
        loss.check_method("sample")


def test_a_damaged_row_of_topk_is_no_sample():
    """Its loss is NaN, which ends a training."""
    _, top = teacher_rows()
    top["target_logprobs"][3, 2] = torch.nan
    for loss in (DistillationLoss(), DistillationLoss("reverse_kl"), DistillationLoss(tail="renormalize")):
        assert loss.per_row(student_logits(), top, TEMPERATURES).isnan().tolist() == [i == 3 for i in range(N)]


def test_held_out_kl_where_every_id_is_in_the_row():
    """Of a sample with as many places as there are ids, the rest is one more event all the same."""
    torch.manual_seed(0)
    teacher = torch.randn(200, 24) * 2
    rows, found = sampled_rows(teacher, 24)
    student = torch.randn(200, 24)
    kept = ~found.target_logprobs.isnan()
    ids = found.target_ids.long().clamp(min=0)
    p, q = (logits.double().softmax(dim=1) for logits in (teacher, student))
    inside = torch.zeros(200, 24, dtype=torch.bool).scatter(1, torch.where(kept, ids, ids[:, :1]), True)
    rest_p, rest_q = (p * ~inside).sum(dim=1), (q * ~inside).sum(dim=1)
    expected = (p * (p / q).log() * inside).sum(dim=1) + torch.special.xlogy(rest_p, rest_p / rest_q)
    assert measured(student, rows, [1.0])[2].item() == pytest.approx(expected.sum().item(), rel=1e-4)


def test_ids_of_a_sample_that_the_student_lacks_count_as_tail():
    teacher, _ = teacher_rows(vocab=V + 4, scale=1.0)
    teacher[:, V:] += 2.0
    rows, found = sampled_rows(teacher, K)
    student, expected = student_logits(), student_logits()
    per_row = DistillationLoss().per_row(student, rows, [1.0])
    w, q = weights(found), expected.double().softmax(dim=1)
    known = (found.target_ids >= 0) & (found.target_ids < V)
    at = q.gather(1, found.target_ids.long().clamp(0, V - 1))
    p_rest = (w * ~known).sum(dim=1)
    there = torch.zeros(N, V).double().scatter_add(1, found.target_ids.long().clamp(0, V - 1), known.double())
    q_rest = (q * (there == 0)).sum(dim=1)
    plain = (torch.special.xlogy(w, w) - torch.special.xlogy(w, at)).mul(known).sum(dim=1)
    plain = plain + torch.special.xlogy(p_rest, p_rest) - torch.special.xlogy(p_rest, q_rest)
    plain = torch.where(known.any(dim=1), plain, 0.0)
    torch.testing.assert_close(per_row.double(), plain, atol=1e-5, rtol=1e-5)
    assert (p_rest > 0.1).any()
    per_row.sum().backward()
    assert student.grad.isfinite().all()
