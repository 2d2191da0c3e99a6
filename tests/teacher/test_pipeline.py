"""Which layers go to which stage."""

import itertools

import pytest

from distill.teacher.pipeline import balance, decoder_layers
from tests.support import MODELS, build_model


def dearest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("costs", [[5, 1, 1, 1, 5], [1, 1, 1, 1], [9, 1, 1, 1, 1, 1, 1, 30], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_as_even_as_can_be(costs: list[int], stages: int) -> None:
    bounds = balance(costs, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert len(bounds) == stages + 1
    assert all(a < b for a, b in itertools.pairwise(bounds))
    ways = itertools.combinations(range(1, len(costs)), stages - 1)
    assert dearest(costs, bounds) == min(dearest(costs, [0, *cuts, len(costs)]) for cuts in ways)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_every_architecture_are_found(name: str) -> None:
    model = build_model(name)
    found = decoder_layers(model)
    assert found is not None
    assert len(found[1]) == model.config.num_hidden_layers
