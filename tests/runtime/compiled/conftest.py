"""Graphs of a compiler are written for one backend, whatever the others of the runtime's tests."""

from collections.abc import Iterator

import pytest

from tests.toys.capturing import Capturing, capturing


@pytest.fixture(autouse=True, params=["capturing"])
def backend() -> Iterator[Capturing]:
    with capturing() as found:
        yield found
