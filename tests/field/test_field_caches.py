"""What a program remembers and how it is set stays, whatever is recorded or built meanwhile."""

import functools
import random
import types

import pytest
import torch
from huggingface_hub import utils as hub
from torch import nn
from transformers.utils import logging

import flashnorm
from flashnorm.graph.build import fake_model
from flashnorm.graph.caches import CACHE
from flashnorm.loading import quiet_transformers

N = 8
X = torch.randn(2, 3, N)
BUILT: list = []


@functools.lru_cache
def table(length):
    return torch.arange(float(length)).unsqueeze(-1)


@functools.cache
def doubled(number):
    return 2 * number


@functools.lru_cache
def by_hand(length):
    return torch.zeros(length, 1)


@functools.cache
def counted_by_hand(length):
    return length * 10**6


class Remembering(nn.Module):
    """Asks functions that remember: by their names, in its class, and as its own attributes."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(N, eps=1e-6), nn.Linear(N, N)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        self.held = (by_hand, counted_by_hand)

    @functools.lru_cache(maxsize=4)  # noqa: B019  what is tested
    def row(self, length):
        return torch.ones(length, 1)

    def forward(self, x):
        length = x.shape[1]
        rows, count = self.held
        scale = table(length) + self.row(length) + rows(length) + doubled(length) + count(length)
        return self.linear(self.norm(x)) + scale


def sizes():
    caches = (table, doubled, vars(Remembering)["row"])
    return [(cache.cache_info().currsize, cache.cache_info().misses) for cache in caches]


def test_field_what_a_program_remembers_stays_the_same_object():
    model = Remembering()
    kept = table(99), model.row(99)
    before = sizes()
    assert flashnorm.inspect(model, (X,)).folded
    assert sizes() == before
    assert table(99) is kept[0]
    assert model.row(99) is kept[1]
    assert [type(held(3)) for held in (table, model.row, by_hand)] == [torch.Tensor] * 3
    assert type(vars(Remembering)["row"]) is CACHE
    assert all(type(held) is CACHE for held in (table, doubled))


def test_field_what_is_asked_by_another_way_forgets_tensors_only():
    model = Remembering()
    rows, count = model.held
    rows.cache_clear()
    count.cache_clear()
    kept = count(99)
    rows(99)
    assert flashnorm.inspect(model, (X,)).folded
    assert rows.cache_info().currsize == 0
    assert type(rows(3)) is torch.Tensor
    assert count.cache_info().currsize == 2
    assert count(99) is kept


class Keeping(nn.Module):
    """Its constructor draws a number, keeps what it made, and asks a function that remembers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.register_buffer("table", table(5) * random.random())
        BUILT.append(self.linear.weight)
        type(self).last = self.linear.bias

    @classmethod
    def _from_config(cls, config, dtype):
        return cls()


def test_field_what_a_constructor_keeps_is_as_before():
    table.cache_clear()
    state = random.getstate()
    assert fake_model(Keeping, types.SimpleNamespace()).linear.weight.shape == (N, N)
    assert random.getstate() == state
    assert not BUILT
    assert not hasattr(Keeping, "last")
    assert type(table(5)) is torch.Tensor


SDP = torch.backends.cuda


class Setting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(N), nn.Linear(N, N)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x):
        SDP.enable_flash_sdp(False)
        SDP.enable_mem_efficient_sdp(False)
        SDP.enable_cudnn_sdp(False)
        return self.linear(self.norm(x))


def test_field_the_kernels_of_attention_that_are_allowed_are_as_before():
    def allowed():
        return SDP.flash_sdp_enabled(), SDP.mem_efficient_sdp_enabled(), SDP.cudnn_sdp_enabled()

    before = allowed()
    assert any(before)
    assert flashnorm.inspect(Setting(), (X,)).folded
    assert allowed() == before


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_bars", [True, False])
def test_field_progress_bars_are_as_before(bars, hub_bars):
    before = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    try:
        _switch(bars, hub_bars)
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
        found = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
        assert found == (bars, hub_bars)
    finally:
        _switch(*before)


def _switch(bars, hub_bars):
    logging.enable_progress_bar() if bars else logging.disable_progress_bar()
    hub.enable_progress_bars() if hub_bars else hub.disable_progress_bars()
