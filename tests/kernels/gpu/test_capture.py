"""Where a capture is, as the driver says it; graphs themselves need a card."""

import ctypes

import pytest
import torch

from flashnorm.kernels import dispatch
from flashnorm.kernels.gpu import capture


class Driver:
    """What libcuda answers about one stream."""

    def __init__(self):
        self.status, self.number, self.last, self.count, self.error = 1, 7, [3], 5, 0

    def info(self, stream, status, number, graph, last, many):
        assert stream == 11
        held = (ctypes.c_void_p * len(self.last))(*self.last)
        self.held = held  # valid until the next call
        status._obj.value, number._obj.value, graph._obj.value = self.status, self.number, 99
        ctypes.memmove(
            ctypes.addressof(last._obj),
            ctypes.byref(ctypes.c_void_p(ctypes.addressof(held))),
            ctypes.sizeof(ctypes.c_void_p),
        )
        many._obj.value = len(self.last)
        return self.error

    def nodes(self, graph, nodes, count):
        assert graph.value == 99
        assert nodes is None
        count._obj.value = self.count
        return self.error


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(capture, "_driver", lambda: (made.info, made.nodes))
    stream = type("Stream", (), {"cuda_stream": 11})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return made


def test_a_place_is_the_same_until_something_is_launched(driver):
    graphs = capture.CudaGraphs()
    before = graphs.position()
    assert before == graphs.position() == (11, 7, 5, (3,))
    changes = ({"last": [4]}, {"count": 6}, {"number": 8}, {"last": [3, 4]}, {"last": []})
    for change in changes:
        old = {name: getattr(driver, name) for name in change}
        vars(driver).update(change)
        assert graphs.position() != before
        vars(driver).update(old)
    assert graphs.position() == before


@pytest.mark.parametrize("change", [{"status": 0}, {"status": 2}, {"error": 1}])
def test_a_place_that_is_not_known_is_like_none(driver, change):
    graphs = capture.CudaGraphs()
    vars(driver).update(change)
    assert graphs.position() != graphs.position()


def test_without_a_driver_no_place_is_known(monkeypatch):
    monkeypatch.setattr(capture, "_driver", lambda: None)
    stream = type("Stream", (), {"cuda_stream": 11})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    graphs = capture.CudaGraphs()
    assert graphs.position() != graphs.position()


def test_the_settings_are_those_that_choose_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    graphs = dispatch.find("gpu").captures
    before = graphs.settings()
    assert before == graphs.settings()
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert graphs.settings() != before
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    try:
        torch.use_deterministic_algorithms(True)
        assert graphs.settings() != before
    finally:
        torch.use_deterministic_algorithms(False)
    assert graphs.settings() == before
    assert hash(before) == hash(graphs.settings())


def test_the_driver_is_asked_by_its_names():
    """Where there is one: the signatures are set, and nothing is called."""
    found = capture._driver()
    if found is None:
        pytest.skip("no driver here")
    info, nodes = found
    assert len(getattr(info, "args", (info,))[0].argtypes) in (6, 7)
    assert len(nodes.argtypes) == 3


@pytest.mark.parametrize("newest", [2, 3])
def test_the_newest_question_that_a_driver_knows_is_asked(newest, monkeypatch, driver):
    """The third has room for the kinds of edges before the number of nodes."""
    asked = []

    def third(*given):
        asked.append(len(given))
        *first, edges, many = given
        assert edges._obj.value is None
        return driver.info(*first, many)

    names = {"cuGraphGetNodes": driver.nodes, "cuStreamGetCaptureInfo_v2": driver.info}
    if newest == 3:
        names["cuStreamGetCaptureInfo_v3"] = third
    library = type("Library", (), {})()
    for name, function in names.items():
        made = type("Function", (), {"__call__": staticmethod(function)})()
        setattr(library, name, made)
    monkeypatch.undo()
    monkeypatch.setattr(capture.ctypes, "CDLL", lambda name: library)
    found = capture._driver.__wrapped__()
    monkeypatch.setattr(capture, "_driver", lambda: found)
    assert capture._position(11) == (7, 5, (3,))
    assert asked == ([7] if newest == 3 else [])
