"""Losses against the dense formulas in float64, with their gradients."""

import pytest
import torch
from torch import nn

from distill.errors import ConfigError
from distill.student.loss import DistillationLoss
from tests.captured import topk

N, V, K = 12, 50, 6
TEMPERATURES = [1.0, 2.5]
KINDS = [
    ("forward_kl", "bucket"),
    ("forward_kl", "renormalize"),
    ("forward_kl", "ground_truth"),
    ("reverse_kl", "bucket"),
    ("jensen_shannon", "bucket"),
]
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon", "on_policy"]


def teacher_rows(k=K, vocab=V, scale=3.0):
    """Logits of a teacher [N, V], the rows that a store would hold of them, unrounded, and the next tokens."""
    torch.manual_seed(0)
    logits = torch.randn(N, vocab) * scale
    following = torch.arange(N) % min(vocab, V)
    following[0] = logits[0].argmax()  # one is among the kept ids for sure
    found = topk(logits.clone(), k, TEMPERATURES, following)
    names = ("target_logprobs", "logsumexp", "tail_logprob", "next_logprob")
    rows = {name: getattr(found, name).clone() for name in names}
    return logits, rows | {"target_ids": found.target_ids.long(), "next_tokens": following}


def student_logits(vocab=V):
    torch.manual_seed(1)
    return (torch.randn(N, vocab) * 2).requires_grad_()


def coarse(logits, ids, temperature=1.0):
    """Probabilities [N, K + 1] of the ids and of all others together, in float64, the plain way."""
    p = (logits.double() / temperature).softmax(dim=1)
    kept = p.gather(1, ids)
    outside = torch.ones_like(p).scatter(1, ids, 0.0)
    return torch.cat([kept, (p * outside).sum(dim=1, keepdim=True)], dim=1)


def dense(loss, teacher, rows, student):
    """The loss of each row from full distributions in float64."""
    t = loss.temperature
    p, q = coarse(teacher, rows["target_ids"], t), coarse(student, rows["target_ids"], t)
    log_q = (student.double() / t).log_softmax(dim=1)
    match loss.divergence, loss.tail:
        case "forward_kl", "bucket":
            divergence = (p * (p.log() - q.log())).sum(dim=1)
        case "forward_kl", "renormalize":
            kept = p[:, :-1] / p[:, :-1].sum(dim=1, keepdim=True)
            divergence = (kept * (kept.log() - log_q.gather(1, rows["target_ids"]))).sum(dim=1)
        case "forward_kl", "ground_truth":
            full = torch.zeros_like(log_q).scatter(1, rows["target_ids"], p[:, :-1])
            full = full.scatter_add(1, rows["next_tokens"][:, None], p[:, -1:])
            divergence = torch.special.xlogy(full, full).sum(dim=1) - (full * log_q).sum(dim=1)
        case "reverse_kl", _:
            divergence = (q * (q.log() - p.log())).sum(dim=1)
        case "on_policy", _:
            following = rows["next_tokens"][:, None]
            log_p = teacher.double().log_softmax(dim=1).gather(1, following)
            divergence = (log_q.gather(1, following) - log_p)[:, 0].square() / 2
        case _:
            m = (p + q) / 2
            divergence = ((p * (p.log() - m.log())).sum(dim=1) + (q * (q.log() - m.log())).sum(dim=1)) / 2
    cross_entropy = nn.functional.cross_entropy(student.double(), rows["next_tokens"], reduction="none")
    return loss.alpha * t**2 * divergence + (1 - loss.alpha) * cross_entropy


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("divergence", "tail", "temperature"),
    [
        *((*kind, temperature) for kind in KINDS for temperature in TEMPERATURES),
        ("on_policy", "bucket", 1.0),
    ],
)
def test_values_and_gradients_are_those_of_the_dense_formula(divergence, tail, temperature, alpha):
    loss = DistillationLoss(divergence, tail, temperature, alpha)
    teacher, rows = teacher_rows()
    ours, theirs = student_logits(), student_logits()
    found, expected = loss.per_row(ours, rows, TEMPERATURES), dense(loss, teacher, rows, theirs)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(0.5, 2.0, N)  # rows do not weigh the same: a gradient put in a wrong row would show
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(divergence):
    teacher, rows = teacher_rows()
    logits = teacher.clone().requires_grad_()
    found = DistillationLoss(divergence).per_row(logits, rows, TEMPERATURES)
    assert found.abs().max() < 1e-5
    found.sum().backward()
    assert logits.grad.abs().max() < 1e-5


def test_all_ids_kept_is_the_full_divergence():
    teacher, rows = teacher_rows(k=8, vocab=8)
    logits = student_logits(8)
    found = DistillationLoss().per_row(logits, rows, TEMPERATURES)
    p, log_q = teacher.softmax(dim=1), logits.log_softmax(dim=1)
    torch.testing.assert_close(found, (p * (p.log() - log_q)).sum(dim=1), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("wider", [0, V - K, V])  # as many places as the student has ids, and more
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_places_of_a_row_that_hold_no_id_the_student_knows(divergence, wider):
    """Ids that it lacks count as tail, places beyond a row's own ids as nothing: values and gradients, by hand."""
    teacher, rows = teacher_rows(vocab=V + 4, scale=1.0)
    teacher[:, V:] += 2.0  # so that padding of the softmax is among the kept
    found = topk(teacher.clone(), K, TEMPERATURES, rows["next_tokens"])
    rows |= {"target_ids": found.target_ids.long(), "target_logprobs": found.target_logprobs.clone()}
    rows |= {"logsumexp": found.logsumexp.clone(), "tail_logprob": found.tail_logprob.clone()}
    known = rows["target_ids"] < V
    assert known.any(dim=1).all()
    assert not known.all()
    kept_ids, p = rows["target_ids"], teacher.double().softmax(dim=1)
    rows["target_ids"] = nn.functional.pad(kept_ids, (0, wider), value=-1)
    rows["target_logprobs"] = nn.functional.pad(rows["target_logprobs"], (0, wider), value=float("nan"))
    target = DistillationLoss(divergence).target(rows, TEMPERATURES, V)
    assert target.tail is not None
    mass = (p.gather(1, kept_ids) * known).sum(dim=1)
    torch.testing.assert_close(target.tail.exp().double(), 1 - mass, atol=1e-5, rtol=1e-5)
    logits, by_hand = student_logits(), student_logits()
    loss = DistillationLoss(divergence).per_row(logits, rows, TEMPERATURES)
    q, values = by_hand.double().softmax(dim=1), []
    for row in range(N):
        ids = kept_ids[row][known[row]]
        ours, theirs = (torch.cat([x[row, ids], 1 - x[row, ids].sum(dim=0, keepdim=True)]) for x in (p, q))
        mean = (ours + theirs) / 2
        forward = (ours * (ours.log() - (mean if divergence == "jensen_shannon" else theirs).log())).sum()
        reverse = (theirs * (theirs.log() - (mean if divergence == "jensen_shannon" else ours).log())).sum()
        values.append({"forward_kl": forward, "reverse_kl": reverse}.get(divergence, (forward + reverse) / 2))
    torch.testing.assert_close(loss.double(), torch.stack(values), atol=1e-4, rtol=1e-4)
    loss.sum().backward()
    torch.stack(values).sum().backward()
    torch.testing.assert_close(logits.grad, by_hand.grad, atol=1e-4, rtol=1e-4)


def batch_of_rows(rows, empty=False):
    """The rows as a batch [2, 6, ...] whose mask leaves out the last row of each."""
    batch = {name: values.view(2, N // 2, *values.shape[1:]) for name, values in rows.items()}
    mask = torch.ones(2, N // 2, dtype=torch.bool)
    mask[:, -1] = False
    return batch | {"loss_mask": mask & (not empty)}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 1000])
@pytest.mark.parametrize("divergence", ["forward_kl", "on_policy"])
def test_chunks_change_nothing(divergence, chunk_tokens):
    _, rows = teacher_rows()
    batch = batch_of_rows(rows)
    found = []
    for chunked in (True, False):
        torch.manual_seed(3)
        head = nn.Linear(16, V)
        hidden = torch.randn(2, N // 2, 16, requires_grad=True)
        loss = DistillationLoss(divergence, alpha=0.5)
        if chunked:
            total = loss.from_hidden(hidden, head, batch, TEMPERATURES, chunk_tokens)
        else:
            mask = batch["loss_mask"]
            total = loss.per_row(head(hidden[mask]), {k: v[mask] for k, v in batch.items()}, TEMPERATURES).sum()
        total.backward()
        assert hidden.grad is not None
        assert (hidden.grad[:, -1] == 0).all()  # rows that are masked out teach nothing
        found.append([total, hidden.grad, head.weight.grad, head.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_chunk_is_larger_than_it_should_be():
    _, rows = teacher_rows()
    seen = []
    head = nn.Linear(16, V)

    def spying(part):
        seen.append(len(part))
        return head(part)

    DistillationLoss().from_hidden(torch.randn(2, N // 2, 16), spying, batch_of_rows(rows), TEMPERATURES, 4)
    assert seen == [4, 4, 2]


@pytest.mark.parametrize("divergence", ["forward_kl", "on_policy"])
def test_an_empty_batch_has_zero_gradients_everywhere(divergence):
    _, rows = teacher_rows()
    head, hidden = nn.Linear(16, V), torch.randn(2, N // 2, 16, requires_grad=True)
    total = DistillationLoss(divergence).from_hidden(hidden, head, batch_of_rows(rows, empty=True), TEMPERATURES)
    total.backward()
    assert total == 0
    for gradient in (hidden.grad, head.weight.grad, head.bias.grad):
        assert gradient is not None
        assert (gradient == 0).all()


def test_extreme_logits_stay_finite():
    _, rows = teacher_rows(scale=60.0)  # tails down to e^-200 and less
    logits = (student_logits() * 50).detach().requires_grad_()
    for divergence in DIVERGENCES:
        loss = DistillationLoss(divergence).per_row(logits, rows, TEMPERATURES)
        assert loss.isfinite().all()
        loss.sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("divergence", "tail", "said_by_teacher"),
    [
        ("forward_kl", "bucket", False),  # infinite otherwise, as it should be
        ("forward_kl", "renormalize", False),
        ("forward_kl", "ground_truth", False),
        ("reverse_kl", "bucket", False),
        ("reverse_kl", "bucket", True),
        ("jensen_shannon", "bucket", False),
        ("jensen_shannon", "bucket", True),
    ],
)
def test_ids_that_the_student_never_says(divergence, tail, said_by_teacher, temperature, alpha):
    """Logits of -inf (a masked vocabulary), of kept ids and of others: values and gradients over the ids that are left.

    said_by_teacher: the teacher gives the kept ones among them some probability.
    """
    loss = DistillationLoss(divergence, tail, temperature, alpha)
    _, rows = teacher_rows()
    masked = torch.zeros(N, V, dtype=torch.bool)
    masked[:, -5:] = True
    masked.scatter_(1, rows["target_ids"], False)
    masked.scatter_(1, rows["next_tokens"][:, None], False)
    never = rows["target_ids"][:, -2:]
    rows["next_tokens"] = torch.where((never == rows["next_tokens"][:, None]).any(dim=1), 0, rows["next_tokens"])
    masked.scatter_(1, never, True)
    masked[:, 0] = False
    if not said_by_teacher:
        rows["target_logprobs"][:, -2:] = torch.where(never == 0, rows["target_logprobs"][:, -2:], -torch.inf)
    logits = student_logits().detach().masked_fill(masked, -torch.inf).requires_grad_()
    found = loss.per_row(logits, rows, TEMPERATURES)
    weights = torch.linspace(0.5, 2.0, N)
    (found * weights).sum().backward()

    theirs = logits.detach().double().masked_fill(masked, 0.0).requires_grad_()
    target = loss.target(rows, TEMPERATURES, V)
    values = []
    for row in range(N):  # by hand: sums over the events that have a probability, over the logits that are left
        left = (~masked[row]).nonzero()[:, 0]
        log_q = torch.full((V,), -torch.inf, dtype=torch.float64)
        log_q = log_q.scatter(0, left, (theirs[row, left] / temperature).log_softmax(dim=0))
        ids, log_p = target.ids[row], target.logprobs[row].double()
        events = [(log_p[i], log_q[ids[i]], not masked[row, ids[i]]) for i in range(len(ids))]
        if target.tail is not None:
            rest = [int(j) for j in left if j not in ids]
            events.append((target.tail[row].double(), log_q[rest].logsumexp(dim=0), True))
        value = torch.zeros((), dtype=torch.float64)
        for p, q, said in events:
            if divergence == "forward_kl" and p > -torch.inf:
                value = value + p.exp() * (p - q)
            elif divergence == "reverse_kl" and said:
                value = value + q.exp() * (q - p.clamp(min=-100.0))
            elif divergence == "jensen_shannon":
                mean = ((p.exp() + q.exp()) / 2 if said else p.exp() / 2).log()
                value = value + (p.exp() * (p - mean) / 2 if p > -torch.inf else 0)
                value = value + (q.exp() * (q - mean) / 2 if said else 0)
        cross_entropy = -theirs[row, left].log_softmax(dim=0)[(left == rows["next_tokens"][row]).nonzero()[0, 0]]
        values.append(alpha * temperature**2 * value + (1 - alpha) * cross_entropy)
    expected = torch.stack(values)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    (expected * weights.double()).sum().backward()
    assert (logits.grad[masked] == 0).all()
    torch.testing.assert_close(logits.grad.double(), theirs.grad.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_student_that_says_nothing_but_the_kept_ids(divergence):
    _, rows = teacher_rows(scale=0.1)  # nearly all mass is in the tail
    outside = torch.ones(N, V, dtype=torch.bool).scatter_(1, rows["target_ids"], False)
    logits = student_logits().detach().masked_fill(outside, -torch.inf).requires_grad_()
    loss = DistillationLoss(divergence, temperature=2.5).per_row(logits, rows, TEMPERATURES)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_rows_of_which_the_student_knows_no_id(divergence, tail, temperature):
    """A padded teacher with few kept ids. One row is such, the others are as they were."""
    _, rows = teacher_rows()
    loss = DistillationLoss(divergence, tail, temperature)
    whole = student_logits()
    usual = loss.per_row(whole, rows, TEMPERATURES)
    usual[[0, *range(2, N)]].sum().backward()
    rows["target_ids"] = rows["target_ids"].clone()
    rows["target_ids"][1] = V + torch.arange(K)
    logits = student_logits()
    found = loss.per_row(logits, rows, TEMPERATURES)
    torch.testing.assert_close(found[[0, *range(2, N)]], usual[[0, *range(2, N)]])
    found[[0, *range(2, N)]].sum().backward()
    torch.testing.assert_close(logits.grad, whole.grad)

    one = student_logits()
    (row,) = loss.per_row(one[1:2], {name: values[1:2] for name, values in rows.items()}, TEMPERATURES)
    row.backward()
    if tail == "ground_truth":  # the next token has all of the mass
        by_hand = student_logits()
        scaled = by_hand[1:2] / temperature
        expected = temperature**2 * nn.functional.cross_entropy(scaled, rows["next_tokens"][1:2])
        expected.backward()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.grad, by_hand.grad, atol=1e-5, rtol=1e-5)
    else:
        assert row == 0
        assert (one.grad == 0).all()
        target = loss.target({name: values[1:2] for name, values in rows.items()}, TEMPERATURES, V)
        if tail == "bucket":
            assert target.tail is not None
            torch.testing.assert_close(target.tail, torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(row, found[1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"divergence": "kl"}, "loss.divergence: expected forward_kl, reverse_kl, jensen_shannon, on_policy, found"),
        ({"divergence": "reverse_kl", "tail": "renormalize"}, "loss.tail: expected bucket with reverse_kl"),
        ({"alpha": 1.5}, "alpha in"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"divergence": "on_policy", "temperature": 2.0}, r"loss\.temperature: expected 1 with on_policy, .* found 2"),
        ({"divergence": "on_policy", "tail": "ground_truth"}, r"loss\.tail: expected bucket with on_policy"),
        ({"divergence": "on_policy", "max_advantage": 0.0}, r"loss\.max_advantage: expected a number > 0, found 0"),
        ({"divergence": "on_policy", "max_ratio": float("nan")}, r"loss\.max_ratio: expected a number > 0, found nan"),
        ({"max_advantage": 2.0}, r"loss\.max_advantage: expected null with forward_kl, found 2"),
        ({"divergence": "reverse_kl", "max_ratio": 2.0}, r"loss\.max_ratio: expected null with reverse_kl, found 2"),
    ],
)
def test_settings_that_make_no_sense(settings, told):
    with pytest.raises(ConfigError, match=told):
        DistillationLoss(**settings)


def test_temperatures_that_the_store_lacks():
    with pytest.raises(ConfigError, match=r"expected one of \[1.0\], .* found 2.0.*temperatures=\[1.0,2.0\]"):
        DistillationLoss(temperature=2.0).check([1.0])
    DistillationLoss(temperature=2.0, tail="renormalize").check([1.0])
    DistillationLoss(temperature=2.0).check([1.0, 2.0])
