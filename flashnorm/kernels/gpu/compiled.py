"""Compile kernels for a GPU that is not there, and read from the result what they take of one.

`python -m flashnorm.kernels.gpu.compiled FILE` writes the table of every kernel in its default
configurations; the tests compile them again and compare.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flashnorm.kernels import norms, weights
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import attention, gemm, packed, rows, skinny
from flashnorm.kernels.gpu.launch import Device
from flashnorm.kernels.gpu.step import Step
from flashnorm.kernels.norms import NormKind
from flashnorm.kernels.weights import FP8, Weight

TARGETS = {80: Device("sm_80", (8, 0), 108), 90: Device("sm_90", (9, 0), 132)}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BYTES = {torch.int8: "i8", torch.uint8: "u8", FP8: "fp8e4nv"}
POINTERS = {**TYPES, **BYTES, torch.int32: "i32", torch.bool: "i1"}
USED = re.compile(r"Function \w+:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def compile_step(step: Step, capability: int) -> Any:
    """The kernel of a step as Triton would compile it for its arguments, for sm_`capability`.

    Pointers count as aligned to 16 bytes, as those of whole tensors are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(step.kernel.params):
        value = step.arguments[parameter.name]
        kind, aligned = _type(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(step.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=step.options())


def _type(value: Any, constant: bool) -> tuple[str, bool]:
    """How Triton sees an argument, and whether it knows that 16 divides it."""
    if isinstance(value, torch.Tensor):
        return f"*{POINTERS[value.dtype]}", True
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def resources(step: Step, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory of a program, bytes spilled by a thread."""
    import triton

    made = compile_step(step, capability)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = USED.search(said)
    assert found is not None, said
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "shared": made.metadata.shared, "spilled": stack + local}


def _call(
    shape: tuple[int, int],
    widths: Iterable[int],
    dtype: torch.dtype,
    norm: NormKind,
    options: Iterable[str],
    activation: str | None = None,
) -> Call:
    """A call on no device: shapes and dtypes only."""

    def made(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    widths, n = list(widths), shape[1]
    return Call(
        made(*shape),
        [made(k, n) for k in widths],
        [made(k) for k in widths] if "bias" in options else None,
        norm,
        1e-6,
        made(n) if "gain" in options else None,
        0.0,
        made(n) if "norm_bias" in options else None,
        made(1) if norm.learns_alpha else None,
        activation,
        made(shape[0], widths[0]) if "residual" in options else None,
    )


# What a model's linears look like: an RMSNorm folded and live, the norms of other models with all
# that they have, and a plain linear with the residual behind it.
NORMS: dict[str, tuple[NormKind, tuple[str, ...]]] = {
    norms.RMS.name: (norms.RMS, ()),
    f"{norms.RMS.name}*gain": (norms.RMS, ("gain",)),
    norms.LAYER.name: (norms.LAYER, ("gain", "norm_bias", "bias")),
    norms.DYT.name: (norms.DYT, ("gain", "norm_bias", "bias")),
    f"{norms.NONE.name}+residual": (norms.NONE, ("residual",)),
}
# Widths n -> k of several weights, and the activation between two.
READERS: dict[str, tuple[tuple[int, ...], str | None]] = {
    "one": ((4096,), None),
    "three": ((4096, 1024, 1024), None),
    "glu": ((14336, 14336), "silu"),
    "split": ((512,), None),
}
# Packed weights: format, features that share a scale (0: all of a row), dtypes of zeros and of
# offsets. Scales are in the dtype of x, and lie as [groups, k].
PACKED: dict[str, tuple[str, int, torch.dtype | None, torch.dtype | None]] = {
    "int8": ("int8-rows", 0, None, None),
    "int8/128+zeros": ("int8-groups", 128, torch.int8, None),
    "int4/128": ("int4-groups", 128, None, None),
    "int4/32+zeros": ("int4-groups", 32, torch.bfloat16, None),
    "int4/64+offsets": ("int4-groups", 64, None, torch.bfloat16),
    "fp8": ("fp8-rows", 0, None, None),
}
FEW = (1, 16, 64)
MANY = 4096
N = 4096
SHARED, HEADS = (1, 4, 8), (64, 128, 256)  # heads that share keys; features of a head


def every_step(device: Device) -> Iterator[tuple[str, Step]]:
    """Every kernel × norm × dtype in its default configuration on a device, with a name each."""
    for dtype in TYPES:
        for norm, (kind, options) in NORMS.items():
            yield from _products(device, dtype, norm, kind, options)
            yield from _norms(dtype, norm, kind, options)
        for name in PACKED:
            yield from _packed(device, dtype, name)
        yield from _attentions(device, dtype)


def _products(
    device: Device, dtype: torch.dtype, norm: str, kind: NormKind, options: tuple[str, ...]
) -> Iterator[tuple[str, Step]]:
    for reader, (widths, activation) in READERS.items():
        if "residual" in options and reader == "three":
            continue
        for count in (*FEW, MANY):
            if count == MANY and reader in ("three", "split"):
                continue
            call = _call((count, N), widths, dtype, kind, options, activation)
            made = [call.x.new_empty(count, k) for k in widths[: 1 if activation else None]]
            found = (gemm if count == MANY else skinny).steps(call, made, device)
            for step in found:
                name = step.kernel.__name__
                if name in ("gemm", "skinny"):
                    yield f"{name} {TYPES[dtype]} {norm} {reader} M={count}", step


def _packed(device: Device, dtype: torch.dtype, name: str) -> Iterator[tuple[str, Step]]:
    """Norms that are live, because packed weights hold no gain."""
    live = f"{norms.RMS.name}*gain"
    alone = [(live, "one"), (live, "three")] if dtype == torch.bfloat16 else []
    for norm, reader in (*alone, (norms.LAYER.name, "glu")):
        (kind, options), (widths, activation) = NORMS[norm], READERS[reader]
        for count in FEW:
            call = _call((count, N), widths, dtype, kind, options, activation)
            call = call._replace(weights=[_packed_weight(name, k, dtype) for k in widths])
            made = [call.x.new_empty(count, k) for k in widths[: 1 if activation else None]]
            for step in packed.steps(call, made, device):
                yield f"packed {TYPES[dtype]} {norm} {name} {reader} M={count}", step


def _packed_weight(name: str, k: int, dtype: torch.dtype) -> Weight:
    form, group, zeros, offsets = PACKED[name]
    found = weights.find(form)

    def numbers(kind: torch.dtype | None) -> torch.Tensor | None:
        if kind is None:
            return None
        return torch.empty(N // group if group else 1, k, dtype=kind, device="meta").t()

    stored = {"int4-groups": torch.uint8, "fp8-rows": FP8}.get(form, torch.int8)
    width = N // 2 if form == "int4-groups" else N
    values = torch.empty(k, width, dtype=stored, device="meta")
    scales = numbers(dtype)
    return Weight(values, found, scales, k, N, group, numbers(zeros), numbers(offsets))


def _norms(
    dtype: torch.dtype, norm: str, kind: NormKind, options: tuple[str, ...]
) -> Iterator[tuple[str, Step]]:
    call = _call((MANY, N), (N, N), dtype, kind, options, "silu")
    made = [call.x.new_empty(MANY, N) for _ in range(2)]
    s = call.x.new_empty(MANY, dtype=torch.float32)
    where = f"{TYPES[dtype]} {norm}"
    if kind.scales and (kind.centers or "gain" not in options):
        mean = s if kind.centers else None
        yield f"row_scale {where}", rows.row_scale_step(call.x, kind, 1e-6, s, mean)
        added = rows.add_stats_step(call.x, made[0], made[1], kind, 1e-6, s, mean)
        yield f"add_stats {where}", added
        yield f"gate {where} silu", rows.gate_step(call, made, s, made[0])
    if kind is not norms.NONE:
        yield f"normalize {where}", rows.normalize_step(call, made[0])


def _attentions(device: Device, dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Of a length that nothing divides, as those are that change with every token."""

    def made(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    for shared, width, mask in product(SHARED, HEADS, (None, torch.bool, dtype)):
        q, k = made(1, 8 * shared, 1, width), made(1, 8, N + 1, width)
        hides = None if mask is None else made(1, 1, 1, N + 1, dtype=mask)
        out = made(1, 1, 8 * shared, width)
        said = {None: "absent", torch.bool: "bool"}.get(mask, "added")
        step = attention.attention_step(q, k, k, hides, 0.1, out, device)
        yield f"attend {TYPES[dtype]} {said} heads={shared} width={width}", step


def table(capability: int, only: re.Pattern[str] | None = None) -> dict[str, dict[str, int]]:
    """Resources by the names of `every_step`; of those whose name `only` finds, if given."""
    return {
        name: resources(step, capability)
        for name, step in every_step(TARGETS[capability])
        if only is None or only.search(name)
    }


def main(file: str) -> None:
    import triton

    found = {f"sm_{capability}": table(capability) for capability in TARGETS}
    whole = {"triton": triton.__version__, "targets": found}
    lines = json.dumps(whole, indent=1)
    # One kernel a line.
    lines = re.sub(r"\{\s+(\"registers\".*?)\s+\}", _one_line, lines, flags=re.DOTALL)
    Path(file).write_text(lines + "\n", "utf-8")


def _one_line(found: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


if __name__ == "__main__":
    main(sys.argv[1])
