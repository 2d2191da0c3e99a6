"""All rank arithmetic, without a process group."""

import pytest

from distill.errors import ConfigError
from distill.run.grid import Grid


def grids(nodes: int, each: int, shard_size: int) -> list[Grid]:
    """Every worker of `nodes` nodes with `each` workers."""
    return [
        Grid(node * each + local, nodes * each, local, each, node, launched=True).sharded(shard_size)
        for node in range(nodes)
        for local in range(each)
    ]


@pytest.mark.parametrize(("nodes", "each", "shard_size"), [(1, 1, 1), (1, 8, 2), (2, 4, 4), (3, 4, 2), (2, 8, 8)])
def test_a_replica_is_consecutive_workers_of_one_node(nodes: int, each: int, shard_size: int) -> None:
    workers = grids(nodes, each, shard_size)
    members: dict[int, list[Grid]] = {}
    for worker in workers:
        members.setdefault(worker.replica, []).append(worker)
    assert sorted(members) == list(range(workers[0].num_replicas))
    assert len(workers) == workers[0].num_replicas * shard_size
    for replica in members.values():
        assert len({worker.node for worker in replica}) == 1
        assert [worker.shard_rank for worker in replica] == list(range(shard_size))
        assert [worker.local_rank for worker in replica] == list(
            range(replica[0].local_rank, replica[0].local_rank + shard_size)
        )


@pytest.mark.parametrize("num_blocks", [0, 1, 5, 16])
def test_blocks_are_dealt_to_replicas(num_blocks: int) -> None:
    workers = grids(2, 4, 2)
    shares = {worker.replica: worker.deal(range(num_blocks)) for worker in workers}
    assert all(worker.deal(range(num_blocks)) == shares[worker.replica] for worker in workers)
    assert sorted(block for share in shares.values() for block in share) == list(range(num_blocks))


@pytest.mark.parametrize(("each", "shard_size"), [(8, 3), (4, 8), (2, 0), (1, 2)])
def test_wrong_degrees_are_refused_with_the_arithmetic(each: int, shard_size: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"expected a divisor of the {each} workers of a node, found {shard_size}: \d+ "
    ):
        Grid(world_size=each, local_world_size=each).sharded(shard_size)


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected as many workers on every node, found 2 on node 1 after 3"):
        Grid(rank=3, world_size=5, local_rank=0, local_world_size=2, node=1).sharded(2)


def test_the_role_names_replica_and_shard() -> None:
    assert Grid(rank=5, world_size=8, local_rank=5, local_world_size=8).sharded(2).role == (
        "replica 2 of 4, shard rank 1 of 2"
    )
    assert Grid().role == ""


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_blocks", [0, 1, 3, 7, 64])
def test_dealt_blocks_have_one_owner(world_size: int, num_blocks: int) -> None:
    blocks = [100 + block for block in range(num_blocks)]
    dealt = [Grid(rank=rank, world_size=world_size).deal(blocks) for rank in range(world_size)]
    assert sorted(block for share in dealt for block in share) == blocks
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
