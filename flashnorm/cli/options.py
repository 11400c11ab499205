"""The options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flashnorm.cli.boundary import DEBUG
from flashnorm.errors import FlashNormError

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write it as one HTML page, too."),
]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Show where an error was raised.", envvar=DEBUG)
]
Untie = Annotated[
    bool, typer.Option("--untie", help="Give a tied head weights of its own, so that it folds too.")
]
Center = Annotated[
    bool,
    typer.Option("--center", help="Center what LayerNorms read, so that they need no mean."),
]
Centre = Annotated[bool, typer.Option("--centre", hidden=True, help="What --center was called.")]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--inputs",
        metavar="FILE",
        help="Inputs to record instead of made-up ones: safetensors or JSON, by argument. May be "
        "given several times; all are recorded.",
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", metavar="local|ray", help="Who writes the shards: ray a cluster.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="The cluster's; RAY_ADDRESS if left, or else this machine alone."),
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A directory, a GGUF file, a config.json or a hub id."),
]


def known_engine(name: str) -> Literal["local", "ray"]:
    """The engine of that name. Raises FlashNormError where there is none."""
    from flashnorm.checkpoint.cluster import ENGINES

    for engine in ENGINES:
        if engine == name:
            return engine
    raise FlashNormError(f"there is no engine {name}: give one of {', '.join(ENGINES)}")
