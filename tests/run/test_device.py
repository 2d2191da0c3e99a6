import pytest
import torch

from distill.errors import ConfigError
from distill.run.device import count_devices, pick_device

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_devices_that_are_not_there():
    assert pick_device("teacher.device", "auto", 0, 1) == CPU
    assert pick_device("teacher.device", "cpu", 3, 8) == CPU
    for wanted in ("cuda", "cuda:1", "tpu", "cuda:x"):
        with pytest.raises(ConfigError, match=r"teacher\.device: expected"):
            pick_device("teacher.device", wanted, 0, 1)


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("teacher.device", "auto", 1, 2) == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    assert pick_device("teacher.device", "auto", 5, 8) == torch.device("cuda", 1)  # shared
    assert pick_device("teacher.device", "cuda:1", 0, 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="expected a GPU for each of the node's 3 workers, found 2"):
        pick_device("teacher.device", "cuda", 2, 3)
    with pytest.raises(ConfigError, match="cuda:0 serves one worker, found 2 on this node"):
        pick_device("teacher.device", "cuda:0", 0, 2)
    with pytest.raises(ConfigError, match="found 2"):
        pick_device("teacher.device", "cuda:2", 0, 1)


def test_a_named_gpu_is_one_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert count_devices("cuda:1", torch.device("cuda", 1), 16) == 1
    assert count_devices("cuda", torch.device("cuda", 0), 16) == 8
    assert count_devices("cpu", CPU, 16) == 16
