"""Every kernel against the float64 reference, within the bounds that the tests derive.

What fails is listed, is not timed, and makes the exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import ours
from benchmarks.gpu.records import DTYPES, Piece, Row, Run
from flashnorm.bench.timing import in_words
from flashnorm.kernels.call import Call
from flashnorm.verification.bounds import unit_roundoff
from tests.kernels.bounds import bound
from tests.kernels.cases import EVERY_ACTIVATION, EVERY_NORM, make

STAGE = "correctness"
SECONDS = 0.45  # of one check, with its part of the compiling
Arguments = dict[str, Any]
# (rows, n, widths): those of the models first, then what no block size divides.
SHAPES = (
    (1, 576, (960,)),
    (16, 2048, (2560,)),
    (64, 2048, (2048, 512, 512)),
    (256, 576, (960,)),
    (1024, 2048, (2560,)),
    (1, 100, (97,)),
    (3, 130, (33, 65)),
    (17, 577, (960,)),
    (65, 576, (961,)),
    (130, 1000, (1001,)),
)
OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"gain": True},
    {"gain": True, "norm_bias": True, "bias": True, "residual": True},
)


def some(run: Run) -> Iterator[Piece]:
    """In bf16: every shape with two of the norms, every activation once."""
    yield from _pieces(run, list(_few("bf16")))


def all_of(run: Run) -> Iterator[Piece]:
    """Every norm × shape × dtype, every activation × shape: minutes."""
    yield from _pieces(run, [case for dtype in DTYPES for case in _every(dtype)])


def _few(dtype: str) -> Iterator[Arguments]:
    for at, shape in enumerate(SHAPES):
        for step in (0, 1):
            yield _case(dtype, shape, EVERY_NORM[(at + step) % len(EVERY_NORM)], at)
    for at, activation in enumerate(EVERY_ACTIVATION):
        yield _gated(dtype, SHAPES[at % 5], activation)


def _every(dtype: str) -> Iterator[Arguments]:
    for (at, shape), norm in product(enumerate(SHAPES), EVERY_NORM):
        yield _case(dtype, shape, norm, at)
    for at, activation in enumerate(EVERY_ACTIVATION):
        for shape in SHAPES[at % 2 : 5 : 2]:
            yield _gated(dtype, shape, activation)


def _case(dtype: str, shape: tuple[int, int, tuple[int, ...]], norm: str, at: int) -> Arguments:
    rows, n, widths = shape
    options = dict(OPTIONS[at % len(OPTIONS)])
    if len(widths) > 1:
        options.pop("residual", None)
    return {"dtype": dtype, "rows": rows, "n": n, "widths": list(widths), "norm": norm, **options}


def _gated(dtype: str, shape: tuple[int, int, tuple[int, ...]], activation: str) -> Arguments:
    rows, n, _ = shape
    common = {"dtype": dtype, "rows": rows, "n": n, "widths": [96, 96], "norm": "rms"}
    return {**common, "gain": True, "activation": activation}


def _pieces(run: Run, cases: list[Arguments]) -> Iterator[Piece]:
    """A piece for each case and way; before the first one all kernels are compiled side by side."""
    left = [
        (way, case)
        for case in cases
        for way in ours.ways(case["rows"], run.settings.device)
        if not run.store.find(STAGE, way=way, **case)
    ]
    different = {str(case): case for _, case in left}
    made = {name: Made(run, case) for name, case in different.items()}
    ours.compile_ahead([(made[str(case)].call, way, None) for way, case in left])
    for way, case in left:
        yield Piece(
            STAGE, {"way": way, **case}, SECONDS, partial(_checked, run, made[str(case)], way)
        )
    failed = failures(run)
    run.say(f"{len(run.store.rows(STAGE))} checks, {len(failed)} failed")
    for row in failed:
        run.say(f"WRONG {row}")


def failures(run: Run) -> list[Row]:
    return [row for row in run.store.rows(STAGE) if row["wrong"]]


class Made:
    """The inputs of one case, made once and where the kernels run, and what is right for them."""

    def __init__(self, run: Run, case: Arguments) -> None:
        options = dict(case)
        rows, n, widths = (options.pop(name) for name in ("rows", "n", "widths"))
        dtype, norm = DTYPES[options.pop("dtype")], options.pop("norm")
        if run.settings.dry:
            rows, n, widths = min(rows, 16), -(-n // 16), [-(-width // 16) for width in widths]
        with torch.device(run.settings.device):
            self.call = make((rows, n), tuple(widths), dtype, norm, **options)
        self._expected: dict[tuple[bool, bool | None], Expected] = {}

    def expected(self, way: str) -> Expected:
        """What is right, once for all ways that round alike."""
        how = roundings(self.call, way)
        if how not in self._expected:
            self._expected[how] = Expected(self.call, way)
        return self._expected[how]


def _checked(run: Run, made: Made, way: str) -> Row:
    try:
        with torch.no_grad(), poisoned(run.settings.device), exact_sums():
            share = made.expected(way).share(ours.run(made.call, way))
    except Exception as error:
        return {"share": None, "wrong": in_words(error)}
    return {"share": share, "wrong": _words(share)}


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """New memory is full of NaN, so that an element which no kernel writes is seen."""
    if device == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def exact_sums() -> Iterator[None]:
    """Parts of a library's sum that are added in half precision have no bound: none are, within."""
    cuda = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(cuda, name) for name in names}
    try:
        for name in names:
            setattr(cuda, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(cuda, name, value)


def roundings(call: Call, way: str) -> tuple[bool, bool | None]:
    """Whether a kernel of ours multiplies, and whether norm(x) is rounded before."""
    way = ours.way_of(call, way)
    return way in ours.TILED, ours.rounds_first(call, way)


class Expected:
    """The float64 results of a call, and how far from them rounding may lead."""

    def __init__(self, call: Call, way: str) -> None:
        fused, first = roundings(call, way)
        with torch.device(call.x.device):
            self.values, self.limits = bound(call, fused, first)
        self.unit = unit_roundoff(call.x.dtype)

    def share(self, found: list[Tensor], roundings: int = 0) -> float:
        """The largest error in parts of its bound; NaN counts as infinite.

        `roundings` are those of a result to the dtype of x that the bound does not hold.
        """
        worst = 0.0
        for y, value, limit in zip(found, self.values, self.limits, strict=True):
            allowed = limit + roundings * self.unit * value.abs()
            shares = ((y.double() - value).abs() / allowed).nan_to_num(nan=torch.inf)
            worst = max(worst, float(shares.max()))
        return worst

    def wrong(self, found: list[Tensor], roundings: int = 0) -> str:
        """Why results are not those of the call, or nothing."""
        return _words(self.share(found, roundings))


def _words(share: float) -> str:
    return "" if share <= 1 else f"the error is {share:.3g} times what rounding explains"
