"""Steps are captured by a twin of CUDA graphs, whatever the backends of the runtime's tests."""

from collections.abc import Iterator

import pytest

from tests.runtime.captured.stepping import twins
from tests.toys.twin import Twin, TwinBackend


@pytest.fixture(autouse=True, params=["twin"])
def backend(monkeypatch) -> Iterator[TwinBackend]:
    with twins(monkeypatch) as found:
        yield found


@pytest.fixture
def twin(backend) -> Twin:
    return backend.captures
