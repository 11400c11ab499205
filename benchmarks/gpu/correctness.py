"""Every kernel against the float64 reference, within the bounds that the tests derive.

What fails is listed, is not timed, and makes the exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import ours
from benchmarks.gpu.nouns import DTYPES, Run
from flashnorm.bench.timing import in_words
from flashnorm.kernels.call import Call
from flashnorm.verification.bounds import unit_roundoff
from tests.kernels.bounds import bound
from tests.kernels.cases import EVERY_ACTIVATION, EVERY_NORM, make

STAGE = "correctness"
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
TOGETHER = 64  # checks whose kernels are compiled at once
DRY_SHAPES = ((1, 32, (48,)), (3, 30, (33, 17)))
OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"gain": True},
    {"gain": True, "shift": True, "bias": True, "residual": True},
)


def correctness(run: Run) -> None:
    """Way by way; a row for each set of arguments, in which `wrong` is empty or says why."""
    device, left = run.settings.device, []
    for arguments in cases(run.settings.dry):
        for way in ours.ways(arguments["rows"], device):
            if not run.store.find(STAGE, way=way, **named(arguments)):
                left.append((way, arguments))
    for first in range(0, len(left), TOGETHER):
        _check(run, left[first : first + TOGETHER])
    failed = failures(run)
    run.say(f"{len(run.store.rows(STAGE))} checks, {len(failed)} failed")
    for row in failed:
        run.say(f"WRONG {row}")


def _check(run: Run, several: list[tuple[str, dict[str, Any]]]) -> None:
    """Some checks, whose kernels are compiled together before."""
    run.budget.check(1.0)
    made = [(way, arguments, made_of(run, arguments)) for way, arguments in several]
    ours.compile_ahead([(call, way, None) for way, _, call in made if way in ours.TILED])
    for way, arguments, call in made:
        run.budget.check()
        with torch.no_grad():
            found = _checked(run, call, way)
        run.store.put(STAGE, {"way": way, **named(arguments)}, found)


def failures(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.store.rows(STAGE) if row["wrong"]]


def cases(dry: bool) -> Iterator[dict[str, Any]]:
    """Arguments of `tests.kernels.cases.make`: norms × shapes and activations, bf16 in full."""
    yield from _of_dtype("bf16", DRY_SHAPES if dry else SHAPES)
    for dtype in () if dry else tuple(DTYPES)[1:]:
        yield from _of_dtype(dtype, SHAPES[::2])


def _of_dtype(
    dtype: str, shapes: tuple[tuple[int, int, tuple[int, ...]], ...]
) -> Iterator[dict[str, Any]]:
    for (at, shape), norm in product(enumerate(shapes), EVERY_NORM):
        options = dict(OPTIONS[at % len(OPTIONS)])
        if len(shape[2]) > 1:
            options.pop("residual", None)
        yield _case(dtype, shape, norm, **options)
    for at, activation in enumerate(EVERY_ACTIVATION):
        for rows, n, _ in shapes[at % 2 : 5 : 2]:
            yield _case(dtype, (rows, n, (96, 96)), "rms", gain=True, activation=activation)


def _case(dtype: str, shape: tuple[int, int, tuple[int, ...]], norm: str, **options: Any) -> Any:
    rows, n, widths = shape
    return {"dtype": dtype, "rows": rows, "n": n, "widths": widths, "norm": norm, **options}


def named(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON keeps it, to be found again."""
    return {**arguments, "widths": list(arguments["widths"])}


def made_of(run: Run, arguments: dict[str, Any]) -> Call:
    options = dict(arguments)
    rows, n, widths = (options.pop(name) for name in ("rows", "n", "widths"))
    dtype, norm = DTYPES[options.pop("dtype")], options.pop("norm")
    return moved(make((rows, n), widths, dtype, norm, **options), run.settings.device)


def _checked(run: Run, call: Call, way: str) -> dict[str, Any]:
    try:
        with poisoned(run.settings.device):
            found = ours.run(call, way)
        share = Expected(call, way).share(found)
    except Exception as error:
        return {"share": None, "wrong": in_words(error)}
    return {"share": share, "wrong": _words(share)}


def moved(call: Call, device: str) -> Call:
    """The same call with its tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [move(each) for each in value] if isinstance(value, (list, tuple)) else value

    return Call(*[move(value) for value in call])


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


class Expected:
    """The float64 results of a call, and how far from them rounding may lead."""

    def __init__(self, call: Call, way: str) -> None:
        way = ours.way_of(call, way)
        with torch.device(call.x.device):
            self.values, self.limits = bound(
                call, fused=way in ours.TILED, first=ours.rounds_first(call, way)
            )
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
