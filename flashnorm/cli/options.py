"""The options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flashnorm.cli import completion
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
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no warnings: only the result, or errors."),
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
Threads = Annotated[int | None, typer.Option(help="Threads; torch's own choice if left.")]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        help="bf16, fp32 or fp16; may be given several times.",
        autocompletion=completion.one_of(completion.DTYPES),
    ),
]
StoredDtypes = Annotated[
    list[str] | None,
    typer.Option(
        help="bf16, fp32 or fp16; may be given several times; as stored if left.",
        autocompletion=completion.one_of(completion.DTYPES),
    ),
]
BenchVariants = Annotated[
    str,
    typer.Option(
        help="Of eager, compile, flashnorm, flashnorm+compile, flashnorm+package.",
        autocompletion=completion.some_of(completion.BENCH_VARIANTS),
    ),
]
EvalVariants = Annotated[
    str,
    typer.Option(
        help="Of original, folded, accelerated.",
        autocompletion=completion.some_of(completion.EVAL_VARIANTS),
    ),
]
Engines = Annotated[
    str,
    typer.Option(
        help="llama.cpp, openvino: here, or name=python of the environment with it.",
        autocompletion=completion.some_of(completion.ENGINES),
    ),
]
Tasks = Annotated[
    str,
    typer.Option(help="Tasks of lm_eval.", autocompletion=completion.some_of(completion.TASKS)),
]


def known_engine(name: str) -> Literal["local", "ray"]:
    """The engine of that name. Raises FlashNormError where there is none."""
    from flashnorm.checkpoint.cluster import ENGINES

    for engine in ENGINES:
        if engine == name:
            return engine
    raise FlashNormError(f"there is no engine {name}: give one of {', '.join(ENGINES)}")
