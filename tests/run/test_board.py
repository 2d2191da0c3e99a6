"""What workers tell each other."""

import threading
from dataclasses import replace

import torch

from distill.run.board import Board, first_of_node
from distill.run.grid import Grid


def test_workers_meet() -> None:
    board, order = Board(torch.distributed.HashStore()), []

    def late() -> None:
        order.append("late")
        board.meet("here", 2, poll_seconds=0.001)

    other = threading.Timer(0.2, late)
    other.start()
    board.meet("here", 2, poll_seconds=0.001)
    order.append("met")
    other.join()
    assert order == ["late", "met"]


def test_the_first_of_a_node_goes_first() -> None:
    board, order = Board(torch.distributed.HashStore()), []

    def act(grid: Grid) -> None:
        with first_of_node(grid, board):
            order.append(grid.rank)

    first = Grid(rank=2, world_size=4, local_rank=0, local_world_size=2, node=1, num_nodes=2)
    late = threading.Timer(0.2, act, [first])
    late.start()
    act(replace(first, rank=3, local_rank=1))
    late.join()
    assert order == [2, 3]
