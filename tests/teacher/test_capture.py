import numpy as np
import pytest
import torch

from distill.teacher.capture import round_logprobs
from tests.captured import topk


@pytest.mark.parametrize(("vocabulary", "k"), [(100, 10), (64, 64), (5000, 50), (50, 1), (1, 1), (2001, 5), (6400, 24)])
def test_capture_is_exact(vocabulary, k):
    torch.manual_seed(0)
    logits = torch.randn(9, vocabulary) * 6
    following = torch.randint(0, vocabulary, (9,))
    following[-1] = -1
    found = topk(logits.clone(), k, [2.0, 1.0], following)
    logprobs = logits.double().log_softmax(-1)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.target_ids.long(), order)
    torch.testing.assert_close(found.target_logprobs.double(), logprobs.gather(1, order), atol=1e-5, rtol=0)
    for column, temperature in enumerate([2.0, 1.0]):
        scaled = logits.double() / temperature
        torch.testing.assert_close(found.logsumexp[:, column].double(), scaled.logsumexp(1), atol=1e-5, rtol=0)
        rest = scaled.scatter(1, order, -torch.inf).logsumexp(1) - scaled.logsumexp(1)
        torch.testing.assert_close(found.tail_logprob[:, column].double(), rest, atol=1e-5, rtol=0)
    expected = logprobs.gather(1, following.clamp(min=0)[:, None])[:-1, 0]
    torch.testing.assert_close(found.next_logprob[:-1].double(), expected, atol=1e-5, rtol=0)
    assert found.next_logprob[-1].isnan()


def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(3, 1000)
    logits[0, 500:520] = 4.0  # more equal logits than are kept
    logits[1, [7, 900, 3]] = 2.0
    found = topk(logits, 5, [1.0], torch.zeros(3, dtype=torch.long))
    assert found.target_ids.tolist() == [[500, 501, 502, 503, 504], [3, 7, 900, 0, 1], [0, 1, 2, 3, 4]]


def test_many_ties_in_a_large_vocabulary():
    logits = torch.randint(0, 4, (50, 4097)).float()
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :7]
    found = topk(logits.clone(), 7, [1.0], torch.zeros(50, dtype=torch.long))
    assert torch.equal(found.target_ids.long(), expected)


def test_a_tail_far_below_the_rest_is_not_lost():
    logits = torch.full((1, 10), -300.0)
    logits[0, 0] = 0.0
    found = topk(logits, 1, [1.0], torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(
        found.tail_logprob[0, 0], torch.tensor(-300 + np.log(9)), atol=1e-4, rtol=0, check_dtype=False
    )


def test_forbidden_ids_and_bad_logits():
    logits = torch.zeros(3, 10)
    logits[0, 2:] = -torch.inf  # fewer possible ids than are kept
    logits[1, 4], logits[2, 4] = torch.nan, torch.inf
    found = topk(logits, 4, [1.0], torch.zeros(3, dtype=torch.long))
    assert found.logsumexp.isfinite().tolist() == [[True], [False], [False]]
    assert found.target_ids[0].tolist() == [0, 1, 2, 3]
    assert found.target_logprobs[0, 2:].tolist() == [-torch.inf, -torch.inf]


def test_rounding_keeps_six_bits():
    values = -np.random.default_rng(0).gamma(1.0, 3.0, 10_000).astype(np.float32)
    rounded = round_logprobs(values)
    assert rounded.dtype == np.float16
    assert not (rounded.view(np.uint16) & 0xF).any()
    normal = values < -1e-4
    assert (np.abs(rounded[normal] / values[normal] - 1) <= 2**-7 + 2**-11).all()
    odd = round_logprobs(np.array([[0.0, -np.inf, np.nan, -1e6]], np.float32))
    assert odd.shape == (1, 4)
    np.testing.assert_array_equal(odd, [[0.0, -np.inf, np.nan, -np.inf]])
