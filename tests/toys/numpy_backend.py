"""A backend in numpy: all that functions, modules and accelerated models ask of one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashnorm.kernels import backend
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu.policy import COMPILED, POLICY
from flashnorm.kernels.weights import DTYPES, packed

ROWS = 16
ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": lambda a: np.maximum(a, 0),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu": lambda a: a * (1 + np.vectorize(math.erf)(a / 2**0.5)) / 2,
    "gelu_tanh": lambda a: a * (1 + np.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3))) / 2,
}


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.dtype)


def normalized(call: Call) -> np.ndarray:
    x, norm = array(call.x), call.norm
    x = x - x.mean(-1, keepdims=True) if norm.centers else x
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + call.eps) if norm.scales else x
    x = np.tanh(x if call.alpha is None else array(call.alpha) * x) if norm.learns_alpha else x
    x = x if call.gain is None else x * (call.gain_offset + array(call.gain))
    return x if call.norm_bias is None else x + array(call.norm_bias)


class Bound:
    """The call with another x."""

    def __init__(self, owner: NumpyBackend, call: Call) -> None:
        self.owner, self.call, self.most = owner, call, ROWS * call.x.shape[-1]

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        return self.owner.run(self.call._replace(x=x, output_residual=output_residual))

    def normalize(self, x: Tensor) -> Tensor:
        return tensor(normalized(self.call._replace(x=x)), x)

    def precomputes(self, x: Tensor) -> bool:
        return x.numel() <= self.most

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return self.normalize(x) if z is None else z, self.run(x)


class Attention(backend.Attention):
    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
        return None if q.shape[2] == 1 and q.is_cpu else "q is not one token on the CPU"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        keys, values = (array(t).repeat(groups, 1) for t in (k, v))
        scores = scale * array(q) @ keys.swapaxes(-1, -2)
        if mask is not None and mask.dtype == torch.bool:
            scores = np.where(mask.numpy(), scores, -np.inf)
        elif mask is not None:
            scores = scores + array(mask)
        top = scores.max(-1, keepdims=True)
        shares = np.exp(scores - np.where(np.isfinite(top), top, 0))
        shares = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-300)
        return tensor((shares @ values).swapaxes(1, 2), q)


class Experts(backend.Experts):
    most = ROWS

    def why_not(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return None if x.dtype == weight.dtype else f"x is {x.dtype}"

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups) -> Tensor:
        found, at = [], 0
        for e, rows in groups:
            part = array(x if len(x) == 1 else x[at : at + rows])
            y = part @ array(weight[e]).T
            found.append(y if bias is None else y + array(bias[e]))
            at += rows
        return tensor(np.concatenate(found), x)


LIMITS, ATTENTION = backend.Limits(tuple(DTYPES), 8, turned=ROWS), Attention()
EXPERTS = Experts()


@dataclass(frozen=True, eq=False)
class NumpyBackend(backend.Backend):
    name: str = "numpy"
    device: str = "cpu"
    limits: backend.Limits = LIMITS
    policy: backend.Policy = POLICY
    compiled: backend.CompiledPolicy = COMPILED
    attention: backend.Attention | str = ATTENTION
    keeps: bool = False
    experts: backend.Experts | str = EXPERTS

    def claims(self, x: Tensor) -> bool:
        return x.is_cpu

    def available(self, device: torch.device) -> tuple[bool, str]:
        return True, "numpy"

    def why_not(self, call: Call) -> str | None:
        if call.norm.code is None or packed(call.weights):
            return "numpy knows neither this norm nor this weight"
        alike = all(t.dtype == call.x.dtype and t.is_cpu for t in call.tensors())
        return None if alike and call.x.dtype in DTYPES else f"x is {call.x.dtype}"

    def run(self, call: Call) -> list[Tensor]:
        z, biases = normalized(call.added()), call.biases or [None] * len(call.weights)
        found = [z @ array(w).T for w in call.dense_weights()]
        found = [y if b is None else y + array(b) for y, b in zip(found, biases, strict=True)]
        found = [ACTIVATIONS[call.activation](found[0]) * found[1]] if call.activation else found
        if call.output_residual is not None:
            found = [found[0] + array(call.output_residual)]
        return [tensor(y, call.x) for y in found]

    def bind(self, call: Call) -> Bound | str:
        try:
            check(call)
        except ValueError as error:
            return str(error)
        return self.why_not(call) or Bound(self, call)

    def gate_(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return gate.copy_(tensor(ACTIVATIONS[activation](array(gate)) * array(up), gate))

    def rows(self, dtype: torch.dtype, n: int, weights: int, compiled: bool) -> int:
        return ROWS
