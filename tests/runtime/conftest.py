"""Every test of the runtime runs on each backend: the CPU's kernels, and a small one in numpy.

What one test compiles counts for no other one: dynamo limits how often that is done.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Backend
from flashnorm.kernels.cpu.backend import CPU
from tests.runtime.models import LLAMA
from tests.runtime.packages import accelerated
from tests.runtime.recorded import recorded
from tests.toys.numpy_backend import NumpyBackend


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, params=["cpu", "numpy"])
def backend(request) -> Iterator[Backend]:
    """What the models of a test run on."""
    if request.param == "cpu":
        if not CPU.available(torch.device("cpu"))[0]:
            pytest.skip("no compiled kernels here")
        yield CPU
        return
    toy = NumpyBackend()
    dispatch.register(toy)
    yield toy
    dispatch.unregister(toy)


@pytest.fixture
def calls(backend, monkeypatch) -> list[tuple[int, ...]]:
    """Grows by the widths of the results of every call of a kernel."""
    return recorded(backend, monkeypatch)


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """Where the packages of all tests are, so that what one compiles is loaded by the others."""
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def only_compiled(backend) -> None:
    if backend is not CPU:  # the one in numpy has neither attention nor operators for packages
        pytest.skip("a backend that runs products alone")


@pytest.fixture
def pair(directory):
    """A model as it is, and one like it with a package."""
    return lambda config=LLAMA, dtype=torch.float32, batch=1: accelerated(
        directory, config, dtype, batch
    )
