"""Kernels that are run once before they are needed, and those that cannot be."""

import pytest
import torch

from flashnorm.errors import FlashNormError
from flashnorm.kernels.gpu import attention, policy, ways
from flashnorm.kernels.gpu.backend import GpuAttention
from flashnorm.kernels.loaded import Loaded


def fails(*_):
    raise RuntimeError("no C compiler")


def test_a_kind_is_tried_once():
    loaded, ran = Loaded(), []
    for _ in range(2):
        loaded.load("a", lambda: ran.append("a"))
    assert ran == ["a"]
    assert "a" in loaded
    assert "b" not in loaded
    assert not loaded.knows("b")


def test_what_fails_is_said_and_not_tried_again(caplog):
    loaded, ran = Loaded(), []
    loaded.load("a", fails)
    loaded.load("a", lambda: ran.append("a"))
    assert loaded.knows("a")
    assert "a" not in loaded
    assert not ran
    assert "a kernel cannot be loaded: RuntimeError: no C compiler" in caplog.text


def test_who_forbids_falling_back_is_obeyed():
    def forbidden():
        raise FlashNormError("forbidden")

    loaded = Loaded()
    with pytest.raises(FlashNormError, match="forbidden"):
        loaded.load("a", forbidden)
    assert not loaded.knows("a")


@pytest.mark.parametrize("works", [True, False])
def test_an_attention_whose_kernel_fails_stays_the_model_s_own(works, monkeypatch):
    tried, kernel = [], GpuAttention()
    monkeypatch.setattr(ways, "unusable", lambda x: None)
    monkeypatch.setattr(kernel, "capturing", lambda: False)
    monkeypatch.setattr(
        attention, "attend", lambda *given: tried.append(given) if works else fails(*given)
    )
    q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 2, 5, 8)
    assert [kernel.why_not(q, k, k) for _ in range(2)] == [policy.EAGER_ATTENTION] * 2
    assert len(tried) == works
    monkeypatch.setattr(kernel, "capturing", lambda: True)
    assert kernel.why_not(q, k, k) == (None if works else policy.NOT_LOADED)
