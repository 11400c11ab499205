from collections import Counter

import pytest

from flashnorm.kernels import fallback
from tests.quantized import decoding


@pytest.fixture
def decoded(monkeypatch):
    """Counts of kernels and of what fell back, of the test alone."""
    decoding.install(monkeypatch)
    monkeypatch.setattr(fallback, "_fallbacks", Counter())
    return decoding
