"""Every model type runs accelerated, to other roundings of the same sums, and comes back."""

import pytest

from flashnorm.kernels.cpu import calls as cpu
from tests.zoo.accelerate import accelerate_outcome
from tests.zoo.coverage import SLOW, recorded

ROWS = {row.name: row for row in recorded() if row.traced}


def marked(names):
    """What takes long is left to the slow tests."""
    slow = {name for name in names if ROWS[name].fold_seconds > SLOW}
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.skipif(not cpu.available()[0], reason="no compiled kernels here")
@pytest.mark.parametrize("name", marked(ROWS))
def test_accelerated_it_is_the_same(name):
    outcome = accelerate_outcome(name)
    # Where rounding alone moves a model further (a router's choice), nothing is known.
    assert outcome.error <= max(outcome.bound, 10 * outcome.noise)
    assert outcome.restored
    assert outcome.acceleration.parts or not ROWS[name].sites
