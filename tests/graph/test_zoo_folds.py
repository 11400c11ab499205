"""Every causal-LM type of transformers, and variants of many: folded exactly or refused."""

import pytest

import flashnorm
from flashnorm.graph.build import fake_model
from flashnorm.graph.recording import record
from flashnorm.planner import make_plan
from tests.zoo import UNBUILDABLE, causal_lm_types, tiny_model, variants
from tests.zoo.classes import whole_models
from tests.zoo.coverage import EXACT
from tests.zoo.fold import fold_outcome

NAMES = [n for n in causal_lm_types() + variants() + whole_models() if n not in UNBUILDABLE]
# Their text has one row of ids per codebook, which no default input can know.
NEED_INPUTS = ("musicgen", "musicgen_melody")


@pytest.mark.parametrize("with_inputs", [False, True], ids=["default", "own"])
@pytest.mark.parametrize("name", NAMES)
def test_fold_is_exact(name, with_inputs):
    if name.split("-")[0] in NEED_INPUTS and not with_inputs:
        pytest.skip("rows of ids per codebook must be passed as example_inputs")
    # On its own inputs with untied heads, centered streams and cancelled scales as well.
    outcome = fold_outcome(name, with_inputs=with_inputs, everything=with_inputs)
    # A model that rounding alone moves further would hide a wrong fold.
    assert outcome.noise < EXACT
    assert outcome.error < EXACT
    assert outcome.plan.sites
    assert all(site.reason for site in outcome.plan.sites if site.gain_state != "folded")
    assert all(site.consumers for site in outcome.plan.folded)


# Their forward asks a tensor for its value (a router's counts, a longest row), which a config
# alone cannot answer: a live model is needed.
NEED_VALUES = (
    "blt",
    "dbrx",
    "jetmoe",
    "longcat_flash",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "xlm",
    "xmod",
)


@pytest.mark.parametrize("name", [n for n in causal_lm_types() if n not in UNBUILDABLE])
def test_a_config_alone_gives_the_plan_of_the_live_model(name):
    if name in NEED_INPUTS:
        pytest.skip("rows of ids per codebook must be passed as example_inputs")
    model = tiny_model(name)
    fake = fake_model(type(model), model.config)
    if name in NEED_VALUES:
        with pytest.raises(flashnorm.TraceError, match="or a live model instead of a config"):
            make_plan(record(fake, allow_real=False))
        return
    planned = make_plan(record(fake, allow_real=False))
    assert planned.sites == make_plan(record(model)).sites
