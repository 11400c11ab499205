"""How far rounding alone can move an output: the one place where tolerances come from.

Notation: u unit roundoff, n width (length of the longest usual contraction), d depth (number of
weight matrices that the data passes), errors relative to the largest magnitude of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn

from flashnorm.quantized import layout

# λ of the probabilistic bounds: one sum keeps within them with probability 1 − 2·exp(−λ²/2), which
# is 0.9993 for λ = 4. More would only hide mistakes.
CONFIDENCE = 4.0

# A rewritten model may be this much farther from the truth in half precision than the original.
HALF_RATIO = 1.1


@dataclass(frozen=True)
class Size:
    """What the bounds know of a model: width n, depth d, and the dtype that holds its weights."""

    width: int
    depth: int
    stored: torch.dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """u = eps / 2: the largest relative error of one rounding to nearest."""
    return float(torch.finfo(dtype).eps) / 2


def output_bound(size: Size, computed: torch.dtype) -> float:
    """Largest relative output error that the roundings of a correct rewrite explain.

        bound = λ · √d · (u_stored + √n · u_computed)

    Two models that are equal in exact arithmetic differ by two kinds of roundings:

    - a rewritten weight is rounded once to its stored dtype, `W*(1 + δ)` with `|δ| <= u_stored`.
      The δ of one row are independent of each other and of x, so that (Hoeffding) the error of an
      element of `W* x` stays below `λ u_stored ‖W*∘x‖` with probability `1 − 2 exp(−λ²/2)`, and
      ‖W*∘x‖ is the size of the product itself: no factor √n.
    - a contraction of n terms that is computed in another order moves by at most λ √n u_computed,
      with the same probability (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

    The d contractions round independently, and a normalized residual stream carries a relative
    error on without enlarging it, so their errors add as squares: √d.
    """
    stored, running = unit_roundoff(size.stored), unit_roundoff(computed)
    return CONFIDENCE * sqrt(size.depth) * (stored + sqrt(size.width) * running)


def width_of(model: nn.Module) -> int:
    """n: the second largest axis of a weight, at its largest (the largest may be a vocabulary)."""
    return max((sorted(p.shape)[-2] for p in model.parameters() if p.ndim >= 2), default=1)


def owns_matrix(module: nn.Module) -> bool:
    """Whether the module itself holds a parameter with two or more axes, or a packed weight: it
    counts in the depth."""
    matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
    return matrix or isinstance(layout.find(module), layout.Held)
