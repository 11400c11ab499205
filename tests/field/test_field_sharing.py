"""Weights that share memory are one weight, whatever objects they are."""

import pytest
import torch
from torch import nn

import flashnorm
from tests.errors import relative
from tests.field.test_field_recording import EXACT, WIDTH, randomize_


class Tied(nn.Module):
    """Two parameters over one memory: what is written to one is written to the other."""

    def __init__(self, share):
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        randomize_(self)
        share(self)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def by_data(m):
    m.head.weight.data = m.embed.weight.data


def by_parameter(m):
    m.head.weight = nn.Parameter(m.embed.weight.detach())


def by_part(m):
    m.head.weight.data = m.embed.weight.data[1:4]


def by_rows_that_overlap(m):
    memory = torch.randn(7, WIDTH)
    m.embed.weight.data, m.head.weight.data = memory[:5], memory[2:]


@pytest.mark.parametrize("share", [by_data, by_parameter, by_part, by_rows_that_overlap])
def test_field_weights_that_share_memory(share):
    model = Tied(share).double()
    share(model)
    ids = torch.tensor([[0, 1, 4, 2]])
    expected = model(ids).detach()
    plan = flashnorm.folding(flashnorm.fold_(model, (ids,)))
    assert [site.gain_state for site in plan.sites] == ["kept"], str(plan)
    assert relative(model(ids), expected) <= EXACT


def test_field_a_view_of_a_weight_kept_by_the_module():
    class Kept(Tied):
        def forward(self, ids):
            return self.norm(self.embed(ids)) @ self.view

    model = Kept(lambda m: None).double()
    model.view = model.embed.weight.detach().T
    ids = torch.tensor([[0, 1, 4, 2]])
    expected = model(ids).detach()
    flashnorm.fold_(model, (ids,))
    assert relative(model(ids), expected) <= EXACT
