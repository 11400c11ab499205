"""What the tab key offers for values of options; paths are completed by the shell itself.

A shell asks at every press of the key, so nothing is imported here: the names are those of
`bench.records`, `bench.models` and `engines.evaluation_records`.
"""

from __future__ import annotations

from collections.abc import Callable

DTYPES = ("bf16", "fp32", "fp16")
BENCH_VARIANTS = ("eager", "compile", "flashnorm", "flashnorm+compile", "flashnorm+package")
EVAL_VARIANTS = ("original", "folded", "accelerated")
ENGINES = ("llama.cpp", "openvino")
TASKS = ("founding_perplexity", "founding_continuation")

Completer = Callable[[str], list[str]]


def one_of(names: tuple[str, ...]) -> Completer:
    """Offers the names that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def some_of(names: tuple[str, ...]) -> Completer:
    """The same behind the last comma of a list, without those that are in it already."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [
            before + comma + name for name in names if name.startswith(last) and name not in given
        ]

    return complete
