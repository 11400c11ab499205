"""Every causal-LM type of transformers, and variants of many: folded exactly or refused."""

import pytest

from tests.zoo import UNBUILDABLE, causal_lm_types, variants
from tests.zoo.coverage import EXACT
from tests.zoo.fold import fold_outcome

NAMES = [name for name in causal_lm_types() + variants() if name not in UNBUILDABLE]
# Their text has one row of ids per codebook, which no default input can know.
NEED_INPUTS = ("musicgen", "musicgen_melody")


@pytest.mark.parametrize("with_inputs", [False, True], ids=["default", "own"])
@pytest.mark.parametrize("name", NAMES)
def test_fold_is_exact(name, with_inputs):
    if name.split("-")[0] in NEED_INPUTS and not with_inputs:
        pytest.skip("rows of ids per codebook must be passed as example_inputs")
    outcome = fold_outcome(name, with_inputs=with_inputs)
    # A model that rounding alone moves further would hide a wrong fold.
    assert outcome.noise < EXACT
    assert outcome.error < EXACT
    assert outcome.plan.sites
    assert all(site.reason for site in outcome.plan.sites if site.gain != "folded")
    assert all(site.consumers for site in outcome.plan.folded)
