"""What `flashnorm eval` does with its options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm.cli.boundary import ERROR, INTERRUPTED, Result

if TYPE_CHECKING:
    from flashnorm.engines import evaluation_records as records


def settings(
    base: str,
    folded: str | None,
    tasks: str,
    dtypes: list[str] | None,
    variants: str,
    limit: int | None,
    batch_size: int,
    include: Path | None,
) -> records.Settings:
    """The options as they were typed, as settings. Raises FlashNormError for counts below one."""
    from flashnorm.engines.evaluation_records import AUTO, Settings
    from flashnorm.errors import FlashNormError

    for option, count in (("--limit", limit), ("--batch-size", batch_size)):
        if count is not None and count < 1:
            raise FlashNormError(f"{option} takes a count of at least 1, not {count}")
    if not (names := _words(tasks)):
        raise FlashNormError(f"--tasks takes names such as hellaswag,wikitext, not {tasks!r}")
    return Settings(
        base=base,
        tasks=names,
        folded=folded,
        dtypes=tuple(dict.fromkeys(dtypes or [AUTO])),
        variants=_words(variants),
        limit=limit,
        batch_size=batch_size,
        include=None if include is None else str(include.expanduser()),
    )


def run_eval(asked: records.Settings, out: Path | None) -> Result:
    """Evaluate, write the files of `out` after every task of every variant, and show the table."""
    from flashnorm.cli.progress import named_steps
    from flashnorm.engines.evaluation import evaluate
    from flashnorm.engines.evaluation_records import write

    prefix, last = None if out is None else out.expanduser(), None

    def found(result: records.Result) -> None:
        nonlocal last
        last = result
        if prefix is not None:
            write(result, prefix)

    with named_steps(f"reading {asked.base}") as steps:
        try:
            result = evaluate(asked, steps, found)
        except KeyboardInterrupt:
            if last is None:
                raise
            sys.stderr.write("\ninterrupted: what was found until now is kept\n")
            return _end(last, prefix, INTERRUPTED)
    return _end(result, prefix, ERROR if result.failures else 0)


def _end(result: records.Result, prefix: Path | None, code: int) -> Result:
    from rich.console import Group
    from rich.text import Text

    from flashnorm.engines.evaluation_records import paths, view

    data, shown = result.to_json(), [view(result)]
    if prefix is not None:
        data["files"] = [str(file) for file in paths(prefix)]
        shown.append(Text(f"\nwritten: {', '.join(data['files'])}"))
    return Result(data, Group(*shown), code)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.replace(",", " ").split()))
