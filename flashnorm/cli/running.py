"""The command `run`: another command, then a summary on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flashnorm.cli.boundary import Result
from flashnorm.cli.pages import promised
from flashnorm.engines.run import run_command


def run_program(
    command: list[str],
    fold: bool,
    package: Path | None,
    report: Path | None,
    html: Path | None,
    quiet: bool,
) -> Result:
    """Run a command to its end; the result has its exit code, and nothing for stdout."""
    package, report = (p and p.expanduser() for p in (package, report))
    page = promised(html)
    if report is not None:
        report.write_text("{}\n", "utf-8")  # what cannot be written is said before, not after
    ran = run_command(command, fold=fold, package=package)
    if not quiet:
        sys.stderr.write(f"{ran}\n")
    if report is not None:
        report.write_text(json.dumps(ran.to_json(), indent=2) + "\n", "utf-8")
    if html is None:
        return Result(ran.to_json(), None, ran.code)
    from flashnorm.engines.run_page import records

    return Result(ran.to_json(), None, ran.code, page(*records(ran)))
