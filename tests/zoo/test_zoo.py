"""Every tiny model builds, runs, and is random enough to show a wrong fold."""

import pytest
import torch

from . import UNBUILDABLE, causal_lm_types, tiny_inputs, tiny_model, variants

BROKEN = [
    pytest.param(name, marks=pytest.mark.xfail(reason=reason, raises=ValueError, strict=True))
    for name, reason in UNBUILDABLE.items()
]
RUNNING = [name for name in causal_lm_types() + variants() if name not in UNBUILDABLE]


def logits_of(model):
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("name", RUNNING + BROKEN)
def test_tiny_model_is_random_finite_and_sensitive_to_its_gains(name):
    model = tiny_model(name)
    logits = logits_of(model)
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    assert torch.equal(logits_of(tiny_model(name)), logits)
    assert not torch.allclose(logits_of(tiny_model(name, seed=1)), logits)
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.numel() > 1]
    assert not any((p == p[0]).all() for p in vectors)
    if not vectors:
        return  # norms without gains
    with torch.no_grad():
        for vector in vectors:
            vector.mul_(1.5)
    assert not torch.allclose(logits_of(model), logits)


def test_every_type_is_in_the_zoo():
    from transformers import AutoModelForCausalLM

    mapped = {config.model_type for config in AutoModelForCausalLM._model_mapping}
    assert mapped - set(causal_lm_types()) == set()
