"""What `flashnorm bench` does with its options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm.cli.boundary import INTERRUPTED, Result, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from flashnorm.bench import records
    from flashnorm.bench.records import Settings
    from flashnorm.bench.tables import Table
    from flashnorm.cli.progress import Steps


@dataclass(frozen=True)
class Asked:
    """The options as they were typed."""

    model: str
    dtypes: list[str] | None
    variants: str
    threads: int | None
    rounds: int
    tokens: int
    context: str
    prefill: str
    memory: bool
    engines: str
    gguf: str | None
    packed: bool


def run_bench(
    asked: Asked, cache: int | None, out: Path | None, html: Path | None, as_json: bool
) -> Result:
    """Measure, show each group of figures as soon as it is there, and write the files of `out`."""
    import flashnorm.bench.run
    from flashnorm.cli.pages import promised
    from flashnorm.cli.progress import named_steps

    promise = promised(html)
    page = _Page(None if as_json else stdout_console(), None if out is None else out.expanduser())
    settings = _settings(asked, cache)
    with named_steps(f"loading {asked.model}") as steps:
        try:
            found = flashnorm.bench.run.bench(
                settings, steps, lambda result, table: page.add(result, table, steps)
            )
        except KeyboardInterrupt:
            if page.last is None:
                raise
            sys.stderr.write("\ninterrupted: what was measured until now is kept\n")
            return page.end(page.last, promise(page.last), INTERRUPTED)
    return page.end(found, promise(found))


class _Page:
    """What is shown and written of a benchmark while it runs. `console` is None for --json."""

    def __init__(self, console: Console | None, out: Path | None) -> None:
        self.console, self.out = console, out
        self.last: records.Result | None = None
        self.dtype = ""

    def add(self, result: records.Result, table: Table, steps: Steps) -> None:
        """One more group."""
        from flashnorm.bench.show import write_text

        with steps.paused():
            self._print(result, table)
            if self.out is not None:
                write_text(result, self.out)
        self.last = result

    def _print(self, result: records.Result, table: Table) -> None:
        from flashnorm.bench.show import begin, group

        if self.console is None:
            return
        if self.last is None:
            self.console.print(begin(result))
        if self.dtype != (now := result.measured[-1].dtype):
            self.dtype = now
            self.console.print(f"\n{now}", style="bold")
        self.console.print(group(table), crop=False)
        self.console.file.flush()

    def end(self, result: records.Result, last: Callable[[], None] | None, code: int = 0) -> Result:
        """All data, and what is said below the tables."""
        from rich.console import Group
        from rich.text import Text

        from flashnorm.bench.show import end, write

        data, view = result.to_json(), [end(result)]
        if self.out is not None:
            files, missing = write(result, self.out)
            data["files"] = [str(file) for file in files]
            view.append(Text(f"\nwritten: {', '.join(data['files'])}"))
            if missing:
                data["notes"].append(missing)
                view.append(Text(missing))
        return Result(data, Group(*view), code, last)


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
        contexts=_counts("--context", asked.context),
        prefill=_counts("--prefill", asked.prefill),
        variants=tuple(dict.fromkeys(_words(asked.variants))),
        cache=cache_bytes() if cache is None else cache,
        memory=asked.memory,
        engines=tuple(dict.fromkeys(_words(asked.engines))),
        gguf=asked.gguf and os.path.expanduser(asked.gguf),
        packed=asked.packed,
    )


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def _counts(option: str, text: str) -> tuple[int, ...]:
    """The numbers in `text`, ascending."""
    from flashnorm.errors import FlashNormError

    try:
        found = tuple(sorted({int(word) for word in _words(text)}))
    except ValueError:
        found = ()
    if not found:
        raise FlashNormError(f"{option} takes token counts such as 1,64,512, not {text!r}")
    return found
