"""Norm + linear as one operation (E4, E5, E6): what models call, eager or compiled.

    y = (norm(x) · (gain_offset + gain) + norm_bias) Wᵀ + c [+ residual]

x: [.., n], weight: [k, n], bias: [k], gain and norm_bias: [n], residual: [.., k]; returns [.., k]
in the dtype of x. Without a gain the norm has none (a folded one has moved into the weight, E1);
with an `input_residual` r, [.., n], x + r is normalized; a weight may also be a `QuantizedWeight`.
`gain_offset=1` is for models that store g − 1.

float32, bfloat16 and float16 run on kernels, on a CPU (C++) and on CUDA (Triton): sums and all else
in float32, one rounding. Anything else runs on torch's own operations, which
`flashnorm.kernels.dispatch` says and can forbid. Gradients (`kernels/autograd.py`) need x, one or
two numbers per row, and for a GLU its two products; nothing else is saved. Under autocast,
torch.func and forward-mode derivatives, and for DTensors, all is torch's own. Shapes that do not
fit raise ValueError with the name of the argument. Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from flashnorm.compat.torch_names import functorch_level
from flashnorm.kernels import dispatch, norms, ops, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.weights import AnyWeight, memories, packed


def run(call: Call) -> list[Tensor]:
    """Any call: directly in eager mode, as a registered operation where something watches."""
    if torch.compiler.is_compiling():
        plain = wants_torch(call.tensors()) or packed(call.weights) is not None
        return reference.norm_linear(call) if plain else ops.run(call)
    gradient = call.needs_gradient()
    if not gradient and not dispatch.watched(call.x, *memories(call.weights)):
        return dispatch.norm_linear(call)
    # torch.jit cannot write down a list of weights.
    plain = dispatch.transformed() or torch.jit.is_tracing() or _sharded(call.tensors())
    plain = plain or packed(call.weights) is not None  # which an operator has no name for
    return reference.norm_linear(call) if plain else ops.run(call)


def wants_torch(tensors: Sequence[Tensor]) -> bool:
    """Whether a compiled graph needs torch's own operations on them."""
    inside = functorch_level() is not None
    return inside or dispatch.autocasting() or dispatch.overridden() or _sharded(tensors)


def _sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor is spread over processes (DTensor): torch knows how to run its own then."""
    if (distributed := sys.modules.get("torch.distributed.tensor")) is None:
        return False
    return any(isinstance(tensor, distributed.DTensor) for tensor in tensors)


def norm_linear(
    x: Tensor,
    weight: AnyWeight,
    bias: Tensor | None = None,
    *,
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    input_residual: Tensor | None = None,
) -> Tensor:
    """`(norm(x)·g + β) Wᵀ + c [+ residual]` with norm "rms", "layer", "dyt" or "none".

    x: [.., n], float32, bfloat16 or float16 for kernels, any floating dtype on the reference;
    weight: [k, n], or a `QuantizedWeight`; bias: [k]; gain and norm_bias: [n]; alpha: one number,
    read by "dyt" alone; residual: [.., k]; input_residual: [.., n], in the dtype of x. Returns
    [.., k] in the dtype of x. Raises ValueError for an unknown norm and for shapes that do not fit,
    FlashNormError where no kernel takes the call and falling back is forbidden.
    """
    biases = None if bias is None else (bias,)
    return run(
        Call(
            x,
            (weight,),
            biases,
            norms.find(norm),
            eps,
            gain,
            gain_offset,
            norm_bias,
            alpha,
            None,
            residual,
            input_residual,
        )
    )[0]


def explain(
    x: Tensor,
    *weights: AnyWeight,
    biases: Sequence[Tensor | None] | None = None,
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    input_residual: Tensor | None = None,
) -> dispatch.Choice:
    """Which backend would run norm + linear for these arguments and why; nothing is computed.

    backend: "cpu", "gpu" or "reference"; reason: on what, or why not a faster one. On a GPU it
    begins with the way ("skinny", "gemm" or "matmul") and says whether that was measured on the
    card or is a default. x: [.., n]; weights [k, n]: one, several that share x, or with an
    activation gate and up; dtypes and the other arguments are those of `norm_linear`. Raises
    ValueError for an unknown norm or activation and for shapes that do not fit.
    """
    return dispatch.explain(
        Call(
            x,
            weights,
            biases,
            norms.find(norm),
            eps,
            gain,
            gain_offset,
            norm_bias,
            alpha,
            activation,
            residual,
            input_residual,
        )
    )


def norm_linears(
    x: Tensor,
    weights: Sequence[AnyWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    input_residual: Tensor | None = None,
) -> list[Tensor]:
    """`[z W_iᵀ + c_i]` with `z = norm(x)·g + β`: the readers of one norm (q, k and v) as one call.

    x: [.., n]; weights: [k_i, n], biases: [k_i] or None each; returns [.., k_i] in the dtype of x.
    Dtypes, the other arguments and what is raised are those of `norm_linear`.
    """
    kind, residuals = norms.find(norm), (None, input_residual)
    return run(
        Call(x, weights, biases, kind, eps, gain, gain_offset, norm_bias, alpha, None, *residuals)
    )


def rms_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """E4: `s ⊙ (x W*ᵀ) + c [+ residual]`, `s = rsqrt(mean(x²) + ε)`; a gain is applied on load.

    x: [.., n], weight: [k, n], bias: [k], gain: [n], residual: [.., k]; returns [.., k] in the
    dtype of x. Dtypes and what is raised are those of `norm_linear`.
    """
    return norm_linear(
        x, weight, bias, eps=eps, gain=gain, gain_offset=gain_offset, residual=residual
    )


def layer_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """E5: `s ⊙ ((x − μ) W*ᵀ) + c [+ residual]`, `s = rsqrt(var(x) + ε)`.

    The mean is taken off x and not, as `μ u`, off the product: where |μ| is far larger than the
    deviation that difference would keep no correct digit. x: [.., n], weight: [k, n], bias: [k],
    gain and norm_bias: [n], residual: [.., k]; returns [.., k] in the dtype of x. Dtypes and what
    is raised are those of `norm_linear`.
    """
    return norm_linear(
        x,
        weight,
        bias,
        norm=norms.LAYER.name,
        eps=eps,
        gain=gain,
        gain_offset=gain_offset,
        norm_bias=norm_bias,
        residual=residual,
    )


def dyt_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    *,
    gain: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """E6: `(tanh(αx)·γ + β) Wᵀ + c [+ residual]`: Dynamic Tanh, whose γ is `gain`, β `norm_bias`.

    x: [.., n], weight: [k, n], bias: [k], alpha: one number, gain and norm_bias: [n], residual:
    [.., k]; returns [.., k] in the dtype of x. Dtypes and what is raised are those of
    `norm_linear`. Source: Dynamic Tanh, arXiv 2503.10622.
    """
    return norm_linear(
        x,
        weight,
        bias,
        norm=norms.DYT.name,
        eps=0.0,
        gain=gain,
        norm_bias=norm_bias,
        alpha=alpha,
        residual=residual,
    )


def norm_glu(
    x: Tensor,
    gate: AnyWeight,
    up: AnyWeight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    norm: str = norms.RMS.name,
    eps: float = 1e-6,
    gain: Tensor | None = None,
    gain_offset: float = 0.0,
    norm_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    input_residual: Tensor | None = None,
) -> Tensor:
    """`act(z Gᵀ + c_g) ⊙ (z Uᵀ + c_u) [+ residual]` with `z = norm(x)·g + β`.

    x: [.., n]; gate, up: [m, n] (the halves of one weight: `*weight.chunk(2)`), their biases [m],
    residual: [.., m]; returns [.., m] in the dtype of x. activation: "silu", "gelu" (erf),
    "gelu_tanh", "relu" or "identity". Dtypes, the other arguments and what is raised are those of
    `norm_linear`; ValueError for an unknown activation, too.
    """
    return run(
        Call(
            x,
            (gate, up),
            (gate_bias, up_bias),
            norms.find(norm),
            eps,
            gain,
            gain_offset,
            norm_bias,
            alpha,
            activation,
            residual,
            input_residual,
        )
    )[0]
