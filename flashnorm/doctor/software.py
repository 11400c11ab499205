"""Versions of what is installed, as the package's own requirements name it, and of engines."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata

from flashnorm.doctor.checks import Check, Row, State

PACKAGES, EXTRAS, ENGINES = "packages", "extras", "engines"
OURS = "flashnorm"
NOT_FOR_USERS = ("test", "lint", "docs")  # extras of those who work on the package
RUNNERS = {
    "vllm": "runs folded models, and our kernels by a plugin",
    "sglang": "runs folded models, strict ones by a plugin",
    "onnxruntime": "runs models that were exported",
    "llama-cpp-python": "an engine to measure against",
    "openvino-genai": "an engine to measure against",
    "peft": "LoRA adapters",
    "torchao": "quantized weights",
    "bitsandbytes": "quantized weights",
    "compressed-tensors": "quantized weights",
}


def _python() -> Iterator[Row]:
    name = f"{platform.python_implementation()} {platform.python_version()}"
    yield Row(PACKAGES, "python", f"{name}, {sys.executable}")
    from flashnorm import __version__

    yield Row(PACKAGES, OURS, __version__)


def _required() -> Iterator[Row]:
    for requirement in _requirements():
        if not requirement.extra:
            yield requirement.row(PACKAGES, "broken")


def _imports() -> Iterator[Row]:
    """Packages that are installed and do not import, which their versions do not tell."""
    for name in (requirement.name for requirement in _requirements() if not requirement.extra):
        if _version(name) is None:
            continue
        try:
            import_module(name.replace("-", "_"))
        except Exception as error:
            said = next(iter(str(error).strip().splitlines()), "")
            found = f"it is installed, but does not import: {type(error).__name__}: {said}"
            yield Row(PACKAGES, f"import {name}", found, "broken", f"pip install -U {name}")


def _extras() -> Iterator[Row]:
    for requirement in _requirements():
        if requirement.extra and requirement.extra not in NOT_FOR_USERS:
            yield requirement.row(EXTRAS, "missing")


def _engines() -> Iterator[Row]:
    for name, what in RUNNERS.items():
        version = _version(name)
        if version:
            yield Row(ENGINES, name, f"{version}: {what}")
        else:
            yield Row(ENGINES, name, f"not installed: {what}", "missing", f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class _Requirement:
    """A package that ours asks for, by the extra that brings it, if one does."""

    def __init__(self, text: str) -> None:
        from packaging.requirements import Requirement

        self.asked = asked = Requirement(text)
        self.name = asked.name
        marks = str(asked.marker or "").replace("'", '"')
        self.extra = marks.partition('extra == "')[2].partition('"')[0]
        self.applies = asked.marker is None or asked.marker.evaluate({"extra": self.extra})

    def row(self, group: str, otherwise: State) -> Row:
        """The version that is there, or `otherwise`."""
        version = _version(self.name)
        mend = f'pip install "{OURS}[{self.extra}]"' if self.extra else f"pip install {self.asked}"
        label = f"{self.name} [{self.extra}]" if self.extra else self.name
        if version is None:
            return Row(group, label, "not installed", otherwise, mend)
        if not self.asked.specifier.contains(version, prereleases=True):
            found = f"{version} is not {self.asked.specifier}"
            return Row(group, label, found, "broken" if not self.extra else "note", mend)
        return Row(group, label, version)


def _requirements() -> list[_Requirement]:
    found = [_Requirement(text) for text in metadata.requires(OURS) or ()]
    return [requirement for requirement in found if requirement.applies]


CHECKS = (
    Check(PACKAGES, "python", _python),
    Check(PACKAGES, "required", _required, needed=True),
    Check(PACKAGES, "imports", _imports, needed=True),
    Check(EXTRAS, "extras", _extras),
    Check(ENGINES, "engines", _engines),
)
