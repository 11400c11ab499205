"""Kinds of norms, formats of weights and backends: each is known in one place only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import pytest

from flashnorm.kernels import norms, weights
from flashnorm.kernels.cpu.calls import ACTIVATION
from tests.test_architecture import FILES, PACKAGE, imported, module_name

# The names of kinds of norms stand in one file. What is called "none" in a plan is no norm, and
# "rms" is a statistic of errors in one place; device code is compared with the rows below.
NORMS, DEVICE = PACKAGE / "kernels/norms.py", PACKAGE / "kernels/gpu/device"
NO_KINDS = [file for file in FILES if file != NORMS and not file.is_relative_to(DEVICE)]
PLANS = ("plan", "planner", "settled", "report", "inspection", "verification.measure")
PLANS += ("html.inspected",)
OTHERWISE = {
    **dict.fromkeys((*PLANS, "runtime.summary", "kernels.gpu.skinny"), ("none",)),
    "html.verified": ("rms",),
    "verification.plain": ("rms",),
}


def kind_strings(source: str, allowed: Iterable[str] = ()) -> list[str]:
    """The constants of a file that are the name of a norm kind; docstrings are not."""
    words = {*norms.KINDS} - {*allowed}
    nodes = ast.walk(ast.parse(source))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and node.value in words]


@pytest.mark.parametrize("file", NO_KINDS, ids=module_name)
def test_kinds_of_norms_are_named_in_one_file(file):
    allowed = OTHERWISE.get(module_name(file).removeprefix("flashnorm."), ())
    assert kind_strings(file.read_text("utf-8"), allowed) == []


@pytest.mark.parametrize(
    "source", ['if call.norm == "layer": pass', 'NORMS = ("rms",)', 'def f(norm="none"): pass']
)
def test_the_name_of_a_kind_is_seen(source):
    assert kind_strings(source)


def test_device_code_names_kinds_that_there_are():
    """Triton compares with constants of its own."""
    pattern = re.compile(r'NORM\b\s*[!=]=\s*"(\w+)"|scan_statistics\(.*?"(\w+)"')
    text = "".join(f.read_text("utf-8") for f in DEVICE.glob("*.py"))
    named = {one or other for one, other in pattern.findall(text)}
    assert {"rms", "layer", "dyt"} <= named
    assert all(norms.KINDS[name].code is not None for name in named)


def test_the_numbers_of_csrc_are_those_of_the_rows():
    text = (PACKAGE / "kernels/cpu/csrc/api.h").read_text("utf-8")

    def numbers(pattern: str) -> dict[str, int]:
        return {name.lower(): int(number) for name, number in re.findall(pattern, text)}

    kinds = {name: kind.code for name, kind in norms.KINDS.items() if kind.code is not None}
    assert numbers(r"NORM_(\w+) = (\d+)") == kinds
    dtypes = {str(dtype).removeprefix("torch."): code for dtype, code in weights.DTYPES.items()}
    found = numbers(r"\b(FLOAT32|BFLOAT16|FLOAT16|BOOLEAN) = (\d+)")
    assert found == dtypes | {"boolean": weights.BOOLEAN}
    acts = {name or "none": code for name, code in ACTIVATION.items()}
    assert numbers(r"ACT_(\w+) = (\d+)") == acts


# What runs models knows backends by what they say of themselves.
FREE_OF_BACKENDS = ("runtime", "functional", "nn", "integrations")
BACKENDS = re.compile(r"flashnorm\.kernels\.(cpu|gpu)\b")


def backends_named(source: str) -> list[str]:
    return [name for name in sorted(imported(ast.parse(source))) if BACKENDS.match(name)]


@pytest.mark.parametrize(
    "file",
    [file for name in FREE_OF_BACKENDS for file in sorted((PACKAGE / name).rglob("*.py"))],
    ids=module_name,
)
def test_no_backend_is_known_by_name(file):
    assert backends_named(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from flashnorm.kernels import cpu",
        "from flashnorm.kernels.gpu import policy",
        "def f():\n    import flashnorm.kernels.cpu.calls",
    ],
)
def test_a_backend_known_by_name_is_seen(source):
    assert backends_named(source)


# Numbers and sizes of dtypes stand in one file; others may say which dtype they mean.
SIZES = re.compile(r"torch\.(?:float32|bfloat16|float16|int8|float8_e4m3fn)\s*:\s*[\d.]+")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_sizes_of_dtypes_stand_in_one_file(file):
    found = SIZES.findall(file.read_text("utf-8"))
    assert found == [] or file == PACKAGE / "kernels/weights.py"


def test_the_map_of_the_sources_names_files_that_there_are():
    root = PACKAGE.parent
    named = re.findall(r"[\w/]+\.(?:py|h)\b", (root / "docs/architecture.md").read_text("utf-8"))
    rooms = (PACKAGE, root / "tests")
    files = [f"/{f.relative_to(root)}" for room in rooms for f in room.rglob("*.*")]
    assert named
    assert [name for name in named if not any(f.endswith(f"/{name}") for f in files)] == []
