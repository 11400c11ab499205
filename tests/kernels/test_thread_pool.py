"""One-row calls on the library's own threads: the same results, whatever the threads do."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flashnorm
from flashnorm.functional import Prepared
from flashnorm.kernels import norms, openmp
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu.attention import attend
from flashnorm.kernels.cpu.library import Library, load
from tests.kernels import cases
from tests.kernels.bounds import assert_close

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "flashnorm/kernels/cpu/csrc"

pytestmark = cases.compiled


@pytest.fixture
def library() -> Iterator[Library]:
    found = load()
    assert isinstance(found, Library)
    before = torch.get_num_threads()
    found.tune_thread_pool(1, -1, 0)
    try:
        yield found
    finally:
        found.tune_thread_pool(1, -1, -1)
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("name", ["thread_pool", "thread_choice"])
def test_what_the_pool_promises(name, sanitizer, tmp_path):
    """Every part once, with threads that sleep, start late and are called from two sides; and the
    threads that are faster, by a clock of the test's own."""
    program = tmp_path / name
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", f"-I{SOURCES}"]
    sources = [str(HERE / f"{name}.cpp"), str(SOURCES / "thread_pool.cpp")]
    made = subprocess.run(["g++", *flags, *sources, "-o", str(program)], capture_output=True)
    if made.returncode and b"cannot find" in made.stderr:
        pytest.skip(f"g++ has no runtime for -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr.decode()
    alone = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # of another sanitizer
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stderr


def layers(count: int = 6) -> list[Prepared]:
    """Enough weights for two threads each: norm + two readers, a GLU, and a plain product."""
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        gain = torch.randn(256)
        made += [
            Prepared([torch.randn(200, 256), torch.randn(72, 256)], gain=gain),
            Prepared([torch.randn(256, 256)] * 2, gain=gain, activation="silu"),
            Prepared([torch.randn(256, 256)], norm="none"),
        ]
    return made


def results(model: list[Prepared], seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [y for layer in model for y in layer(torch.randn(1, 256))]


def test_results_do_not_depend_on_who_computes_and_what_is_read_ahead(library):
    torch.set_num_threads(2)
    model = layers()
    library.tune_thread_pool(0, 0, 0)
    calls = library.thread_pool_calls()
    expected = results(model)
    assert library.thread_pool_calls() == calls
    for threads, ahead in ((2, -1), (2, 0), (2, 1 << 30), (3, -1), (8, 100)):
        torch.set_num_threads(threads)
        library.tune_thread_pool(1, ahead, 0)
        for _ in range(5):
            for y, truth in zip(results(model), expected, strict=True):
                assert torch.equal(y, truth)
    assert library.thread_pool_calls() > calls


def test_heads_are_attended_once_with_more_threads_than_cores(library):
    """Its parts are cut beforehand: what a late thread leaves is done by the caller."""
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 8, 300, 64), torch.randn(1, 8, 300, 64)
    library.tune_thread_pool(0, 0, 0)
    torch.set_num_threads(8)
    expected = attend(q, k, v, 0.125)
    library.tune_thread_pool(1, -1, 0)
    for _ in range(200):
        assert torch.equal(attend(q, k, v, 0.125), expected)


def test_several_python_threads_at_once(library):
    torch.set_num_threads(2)
    model = layers()
    expected = results(model)
    with ThreadPoolExecutor(4) as pool:
        inputs = [torch.randn(1, 256) for _ in range(4)]
        alone = [[y for layer in model for y in layer(x)] for x in inputs]
        for _ in range(20):
            for found, truth in zip(
                pool.map(lambda x: [y for layer in model for y in layer(x)], inputs),
                alone,
                strict=True,
            ):
                assert all(map(torch.equal, found, truth))
    assert all(map(torch.equal, results(model), expected))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_pool_of_its_own(library):
    torch.set_num_threads(2)
    model = layers(1)
    expected = results(model)
    child = os.fork()
    if child == 0:  # the threads of this process do not exist in that one
        before = threads()
        same = all(map(torch.equal, results(model), expected))
        time.sleep(0.05)  # and OpenMP's neither, to which a call after a pause must not be left
        same = same and all(map(torch.equal, results(model), expected))
        os._exit(0 if same and threads() > before else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_weights_that_are_gone_are_not_missed(library):
    """The order of calls is remembered by addresses, which may belong to nobody by now."""
    torch.set_num_threads(2)
    x = torch.randn(1, 256)
    for _ in range(20):
        weights = [torch.randn(4096, 256) for _ in range(4)]
        for weight in weights:
            assert_close(Call(x, [weight], norm=norms.NONE), Prepared([weight], norm="none")(x))
        del weights, weight


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads")
def test_an_accelerated_model_leaves_no_threads_of_openmp_behind(library):
    """They would be counted beside those of the thread that runs the model, which then sleep."""
    if openmp.pause() is None:
        pytest.skip("another runtime than GNU's")
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)).eval()

    def loaded() -> int:
        torch.set_num_threads(8)
        torch.randn(1024, 1024) @ torch.randn(1024, 1024)
        with_threads = threads()
        flashnorm.accelerate_(model, (torch.randn(2, 64),))
        return with_threads - threads()

    with ThreadPoolExecutor(1) as caller:  # whose threads are its own
        assert caller.submit(loaded).result() >= 7
