"""A process of its own that loads the compiled kernels and holds them to the reference.

    python -m flashnorm.doctor.probe

Prints one line of JSON. A library that ends the process ends this one and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import calls
from flashnorm.kernels.cpu.library import Library, load, use_isa
from flashnorm.kernels.weights import DTYPES

FEATURES, WIDTH, ROWS = 200, 96, (1, 5)


def probe() -> dict[str, Any]:
    """What the library is, and for each instruction set of this processor what was wrong."""
    library = load()
    if not isinstance(library, Library):
        return {"why_not": library}
    return {
        "built": library.isas,
        "supported": library.supported(),
        "used": library.isa,
        "threads": library.threads,
        "wrong": {isa: list(_wrong(isa)) for isa in library.supported()},
    }


def _wrong(isa: str) -> Iterator[str]:
    with use_isa(isa):
        for dtype in DTYPES:
            for rows in ROWS:
                call = _call(rows, dtype)
                if reason := calls.why_not(call):
                    yield f"{dtype} is refused: {reason}"
                elif (found := excess(call, calls.run(call)[0])) > 1:
                    yield f"a product in {dtype} is {found:.1f} times as far off as rounding allows"


def _call(rows: int, dtype: torch.dtype) -> Call:
    made = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    weight, gain, bias = random(WIDTH, FEATURES), random(FEATURES), random(WIDTH)
    return Call(random(rows, FEATURES) + 0.7, [weight], [bias], norms.RMS, 1e-5, gain)


def excess(call: Call, y: Tensor) -> float:
    """The largest error of y [rows, k] as a multiple of what rounding allows; NaN counts as inf.

    Against float64: z, y and the terms of a sum of n are rounded, the sum in float32, so that
    |y − ŷ| <= (3 u + (n + 8) u₃₂) · (|z| |W|ᵀ + |c|), u the unit roundoff of the dtype.
    """
    wide = call._replace(
        x=call.x.double(),
        weights=[w.double() for w in call.dense_weights()],
        biases=[c.double() for c in call.biases or () if c is not None],
        gain=None if call.gain is None else call.gain.double(),
    )
    truth = reference.norm_linear(wide)[0]
    z, weight = reference.normalized(wide), wide.dense_weights()[0]
    size = z.abs() @ weight.abs().T
    for bias in wide.biases or ():
        size += 0 if bias is None else bias.abs()
    unit, single = (torch.finfo(dtype).eps / 2 for dtype in (call.x.dtype, torch.float32))
    allowed = (3 * unit + (z.shape[-1] + 8) * single) * size
    found = ((y.double() - truth).abs() / allowed).max().item()
    return found if found == found else float("inf")


if __name__ == "__main__":
    print(json.dumps(probe()))
