"""What `flashnorm bench` does with its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm.cli.boundary import Result

if TYPE_CHECKING:
    from flashnorm.bench.records import Settings


@dataclass(frozen=True)
class Asked:
    """The options as they were typed."""

    model: str
    dtypes: list[str] | None
    variants: str
    threads: int | None
    rounds: int
    tokens: int
    context: int
    prefill: str
    memory: bool


def run_bench(asked: Asked, cache: int | None, out: Path | None) -> Result:
    """Measure, write the files that `out` names, and show everything."""
    from rich.console import Group
    from rich.text import Text

    import flashnorm.bench.run
    from flashnorm.bench.show import show, write
    from flashnorm.cli.progress import named_steps

    with named_steps(f"loading {asked.model}") as report:
        found = flashnorm.bench.run.bench(_settings(asked, cache), report)
    data, view = found.to_json(), [show(found)]
    if out is not None:
        files, missing = write(found, out.expanduser())
        data["files"] = [str(file) for file in files]
        view.append(Text(f"\nwritten: {', '.join(data['files'])}"))
        if missing:
            data["notes"].append(missing)
            view.append(Text(missing))
    return Result(data, Group(*view))


def _settings(asked: Asked, cache: int | None) -> Settings:
    import torch

    from flashnorm.bench.machine import cache_bytes
    from flashnorm.bench.records import Settings

    return Settings(
        source=asked.model,
        dtypes=tuple(dict.fromkeys(asked.dtypes or ["bf16"])),
        threads=torch.get_num_threads() if asked.threads is None else asked.threads,
        rounds=asked.rounds,
        tokens=asked.tokens,
        context=asked.context,
        prefill=_counts(asked.prefill),
        variants=tuple(dict.fromkeys(_words(asked.variants))),
        cache=cache_bytes() if cache is None else cache,
        memory=asked.memory,
    )


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def _counts(text: str) -> tuple[int, ...]:
    """The numbers in `text`, ascending."""
    from flashnorm.errors import FlashNormError

    try:
        found = tuple(sorted({int(word) for word in _words(text)}))
    except ValueError:
        found = ()
    if not found:
        raise FlashNormError(f"--prefill takes token counts such as 1,64,512, not {text!r}")
    return found
