"""A short form of `make sanitize`: the kernels under two sanitizers."""

from __future__ import annotations

import pytest

from tests.kernels import cases, sanitize

# Every kernel once: products, norm and gate for many rows, and the edges of their loops.
PART = ("tests/kernels/test_cpu_options.py", "-k", "strides or many_rows or glu or bandwidth")


@pytest.mark.slow
@cases.compiled
def test_the_kernels_stay_within_their_memory(tmp_path):
    if isinstance(said := sanitize.runtimes(), str):
        pytest.skip(said)
    library = sanitize.build(tmp_path)
    isas = sanitize.supported(library)
    assert set(cases.ISAS) <= set(isas)
    assert sanitize.sees_out_of_bounds(library, isas[0])
    done = sanitize.run_tests(library, *PART, quiet=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
