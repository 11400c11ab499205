"""The environment variables that flashnorm reads, and those that are set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator

from flashnorm.doctor.checks import Check, Row

SETTINGS = "settings"
PREFIX = "FLASHNORM_"
VARIABLES = {
    "FLASHNORM_CPU_ISA": "the instruction set that the CPU kernels use, as avx2 or portable",
    "FLASHNORM_CPU_LIBRARY": "another file than the installed library of CPU kernels",
    "FLASHNORM_CPU_CACHE": "where `flashnorm tune` keeps what it measures; off: nowhere",
    "FLASHNORM_GPU_CACHE": "where measurements of cards are kept; off: nowhere",
    "FLASHNORM_GPU_OFF": "parts of the GPU kernels that are not used, with commas between",
    "FLASHNORM_FALLBACK": "forbid: an error where a call would fall back to torch's operations",
    "FLASHNORM_FOLD": "1: the plugin of SGLang folds gains when a model is loaded",
    "FLASHNORM_DEBUG": "1: show where an error was raised, as --traceback does",
    "FLASHNORM_RAISE_BUGS": "1: raise what a rule of the analysis did not expect (for tests)",
    "FLASHNORM_RUN": "set by `flashnorm run` for the program that it starts",
}
# Read when the package is built.
BUILD = {
    "FLASHNORM_NO_KERNELS": "1: install without compiled kernels",
    "FLASHNORM_NEED_KERNELS": "1: an installation without compiled kernels is an error",
    "FLASHNORM_SANITIZE": "1: build the kernels with sanitizers, which is slow",
}
# Of other libraries.
OTHERS = {
    "OMP_NUM_THREADS": "how many threads torch and the CPU kernels use",
    "XDG_CACHE_HOME": "the folder of caches, ~/.cache if unset",
    "HF_HUB_OFFLINE": "1: the hub is not asked; what its cache holds is read",
    "HF_ENDPOINT": "the address of another hub",
    "HF_HOME": "where the hub's cache is",
    "NO_COLOR": "any text: no colours",
    "COLUMNS": "how wide tables are where the output is no terminal; 120 if unset",
}


def _settings() -> Iterator[Row]:
    known = {**VARIABLES, **BUILD}
    for name in sorted(os.environ):
        if name in known:
            yield Row(SETTINGS, name, f"{os.environ[name]}: {known[name]}", "note")
        elif name.startswith(PREFIX):
            yield Row(SETTINGS, name, "flashnorm reads no such variable", "note", _meant(name))
        elif name in OTHERS:
            yield Row(SETTINGS, name, os.environ[name])


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*VARIABLES, *BUILD], n=1)
    return f"is {close[0]} meant?" if close else f"unset {name}"


CHECKS = (Check(SETTINGS, "environment", _settings),)
