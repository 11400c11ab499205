"""Every kind of checkpoint in transformers, loaded in one word: the tokens of the plain one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, logging

import flashnorm
from flashnorm import AutoFlashNormForCausalLM

from . import models

PROMPTS = [[5, 6, 7, 8, 9, 10], [200, 3, 77], [11] * 9]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(autouse=True)
def _quiet():
    """transformers lists the gains that a strict checkpoint leaves out."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def tokens(model) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    given = (torch.tensor([prompt]) for prompt in PROMPTS)
    with torch.inference_mode():
        return [model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in given]


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_greedy_tokens_are_those_of_the_plain_one(root, family, kind):
    plain = AutoModelForCausalLM.from_pretrained(models.checkpoint(root, family, "plain")).eval()
    place = models.checkpoint(root, family, kind)
    as_it_is = AutoModelForCausalLM.from_pretrained(place).eval()
    accelerated = AutoFlashNormForCausalLM.from_pretrained(place).eval()
    assert flashnorm.acceleration(accelerated) is not None
    assert tokens(as_it_is) == tokens(accelerated) == tokens(plain)
