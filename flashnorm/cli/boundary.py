"""Where a command meets the shell: errors, interrupts, closed pipes, and what goes to which stream.

Results go to stdout, everything else to stderr. A command ends with 0 for yes, 1 for no, 2 for an
error, 130 where it was interrupted, 141 where nobody reads its output any more.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.console import Console, RenderableType

from flashnorm.errors import FlashNormError
from flashnorm.extras import why_not

ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
DEBUG = "FLASHNORM_DEBUG"
WIDTH = 120  # columns where stdout is no terminal
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class Output(Console):
    """A console whose reader may leave early: the boundary hears of it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass
class Result:
    """What a command has to say: `data` for --json, `view` for people, `code` for scripts.

    `last` is done when all of that is out, so that nothing is lost where it fails.
    """

    data: dict[str, Any]
    view: RenderableType | None
    code: int = 0
    last: Callable[[], None] | None = None


@dataclass
class Options:
    """How a command talks. `on_interrupt` is said after Ctrl-C, `foreign` programs say the rest."""

    as_json: bool
    debug: bool
    quiet: bool = False
    on_interrupt: str = ""
    foreign: bool = False
    printed: bool = False
    warned: list[str] = field(default_factory=list)


def run(command: Callable[[], Result], options: Options) -> None:
    """Run a command, print its result once, and end with its exit code."""
    with _pipes_closed(), _interrupts_explained(options), _errors_explained(options):
        with _kept_quiet(options), _progress_hidden(options):
            result = command()
        if options.as_json:
            _print_json(result.data | ({"warnings": options.warned} if options.warned else {}))
        elif result.view is not None:
            _print(result.view)
        options.printed = True
        if result.last is not None:
            result.last()
    raise typer.Exit(result.code)


def stdout_console() -> Console:
    """The console for results; wide where no terminal sets a width."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    return Output(file=sys.stdout, width=width)


def stderr_console() -> Console:
    """The console for progress and warnings; it says nothing under --quiet."""
    return Output(file=sys.stderr, quiet=is_quiet())


def is_quiet() -> bool:
    """Whether a command was started with --quiet."""
    return _quiet.get()


@contextmanager
def _progress_hidden(options: Options) -> Iterator[None]:
    before = _quiet.set(options.quiet)
    try:
        yield
    finally:
        _quiet.reset(before)


def _print(view: RenderableType) -> None:
    stdout_console().print(view, crop=False)
    sys.stdout.flush()


def _print_json(data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # names of files may be bytes that are no text
        text = json.dumps(data, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def harmless(text: str) -> str:
    """Without what a terminal would obey: names of tensors and files may hold its commands."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@contextmanager
def _kept_quiet(options: Options) -> Iterator[None]:
    """Only flashnorm's own warnings, as one line each; nothing but the result on stdout."""
    if options.foreign:
        yield
        return
    from flashnorm.loading import quiet_transformers

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        options.warned.append(str(message))
        if not options.quiet:
            sys.stderr.write(f"warning: {harmless(str(message))}\n")

    quiet = quiet_transformers if not why_not("transformers") else nullcontext
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"flashnorm\b")
        warnings.showwarning = warn
        if not options.as_json:
            yield
            return
        with redirect_stdout(sys.stderr):
            yield


@contextmanager
def _errors_explained(options: Options) -> Iterator[None]:
    """One line for an error, the traceback on demand; exit code 2 for every one."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        try:
            _report(_in_words(error), options)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # stdout is full: Python would try again when it ends
            _leave_stdout()
        raise typer.Exit(ERROR) from None


@contextmanager
def _interrupts_explained(options: Options) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if options.debug:
            traceback.print_exc()
        sys.stderr.write(f"\ninterrupted{': ' if options.on_interrupt else ''}")
        sys.stderr.write(f"{options.on_interrupt}\n")
        raise typer.Exit(INTERRUPTED) from None


def _in_words(error: Exception) -> str:
    if isinstance(error, FlashNormError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return (
        f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (this is a defect of "
        f"flashnorm: run again with --traceback and report what it prints)"
    )


def _report(message: str, options: Options) -> None:
    sys.stderr.write(f"error: {harmless(message)}\n")
    if options.as_json and not options.printed:
        _print_json({"error": message})


@contextmanager
def _pipes_closed() -> Iterator[None]:
    """Nobody reads any more: end, and keep Python from complaining when it flushes stdout."""
    try:
        yield
    except BrokenPipeError:
        _leave_stdout()
        raise typer.Exit(PIPE_CLOSED) from None


def _leave_stdout() -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
