from collections import Counter

import pytest

from flashnorm.kernels import fallback
from tests.quantized import decoding


@pytest.fixture
def decoded(monkeypatch):
    """Kernels that take packed weights; counts of calls are those of the test."""
    decoding.install(monkeypatch)
    monkeypatch.setattr(fallback, "_fallbacks", Counter())
    return decoding
