"""Counters of launches: zeros that nobody else has."""

import pytest
import torch

from flashnorm.kernels.gpu import counters

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """A device whose counters are reserved, while a step is captured."""
    monkeypatch.setattr(counters, "_free", {CPU: torch.zeros(20, dtype=torch.int32)})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def places(tensor):
    return set(range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))


def test_every_captured_launch_has_its_own(capturing):
    whole = counters._free[CPU]
    found = [counters.take(count, CPU) for count in (3, 1, 6)]
    assert [len(each) for each in found] == [3, 1, 6]
    assert sum(len(places(each)) for each in found) == len(set().union(*map(places, found)))
    assert all(places(each) <= places(whole) for each in found)
    assert all((each.data_ptr() - whole.data_ptr()) % 16 == 0 for each in found)


def test_when_none_are_left_a_launch_sets_its_own_to_zero(capturing):
    whole = counters._free[CPU]
    counters.take(18, CPU)
    more = counters.take(1, CPU)
    assert not places(more) & places(whole)
    assert not more.any()


def test_outside_of_a_capture_they_are_new(capturing, monkeypatch):
    whole = counters._free[CPU]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not places(counters.take(4, CPU)) & places(whole)
    assert len(counters._free[CPU]) == 20


def test_only_a_gpu_has_some_reserved(monkeypatch):
    monkeypatch.setattr(counters, "_free", {})
    counters.reserve(CPU)
    assert not counters._free
    assert counters.take(2, CPU).tolist() == [0, 0]
