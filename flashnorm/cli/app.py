"""The commands. Each imports what it needs when it runs, so that `--help` is immediate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashnorm.cli import examples
from flashnorm.cli.boundary import Options, Result, run, stderr_console, stdout_console
from flashnorm.cli.options import (
    AsJson,
    BenchVariants,
    Center,
    Centre,
    Dtypes,
    Engine,
    Engines,
    EvalVariants,
    Html,
    Inputs,
    Model,
    Quiet,
    RayAddress,
    StoredDtypes,
    Tasks,
    Threads,
    Traceback,
    Untie,
    known_engine,
)

app = typer.Typer(
    name="flashnorm",
    help="Fold normalization gains into the neighbouring linear layers, exactly, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from flashnorm import __version__

        typer.echo(f"flashnorm {__version__}")
        raise typer.Exit


@app.command("inspect", epilog=examples.of("inspect"))
def inspect_command(
    model: Model,
    untie: Untie = False,
    center: Center = False,
    centre: Centre = False,
    inputs: Inputs = None,
    every: Annotated[bool, typer.Option("--all", help="One row per norm.")] = False,
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Show every norm of a model, whether its gain folds, into what, and if not why.

    Reads no weights but the gains: seconds for a model of any size.
    """

    def command() -> Result:
        import flashnorm
        from flashnorm.cli.inputs import read_inputs
        from flashnorm.cli.pages import promised
        from flashnorm.cli.progress import waiting
        from flashnorm.report import show

        page = promised(html)
        given = read_inputs(inputs)
        with waiting(f"recording {model}"):
            plan = flashnorm.inspect(model, given, untie=untie, center=_center(center, centre))
        return Result(plan.to_json(), show(plan, every=every), last=page(plan, model))

    run(command, Options(as_json, debug, quiet))


@app.command("fold", epilog=examples.of("fold"))
def fold_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory, a GGUF file, or a URL as s3://…")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="The new directory to write, or a URL as s3://…")
    ],
    strict: Annotated[
        bool, typer.Option("--strict", help="Leave folded gains out: not every engine reads it.")
    ] = False,
    untie: Untie = False,
    center: Center = False,
    centre: Centre = False,
    inputs: Inputs = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Write a copy of a checkpoint with its gains folded; every shard is read and written once.

    DST appears complete or not at all. A run that was interrupted goes on where it stopped.
    """

    def command() -> Result:
        from flashnorm.cli.fold import run_fold

        how = {"strict": strict, "untie": untie, "center": _center(center, centre)}
        where = known_engine(engine), ray_address
        return run_fold(source, target, inputs, how, *where)

    stays = f"the shards that are finished stay beside {target}; run the same command to go on"
    run(command, Options(as_json, debug, quiet, stays))


@app.command("fold-adapter", epilog=examples.of("fold-adapter"))
def fold_adapter_command(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The directory of a LoRA.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The new directory to write.")],
    plan: Annotated[
        Path | None,
        typer.Option(help="What `inspect --json` printed; without it BASE is inspected."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The original base; without it the directory that ADAPTER names."),
    ] = None,
    folded: Annotated[
        str | None, typer.Option(help="The folded base, to be checked and named in OUT.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Make a PEFT LoRA that was trained on the original base fit the folded one, exactly.

    PLAN has to be the plan that the base was folded by.
    """

    def command() -> Result:
        import flashnorm
        from flashnorm.cli.inputs import read_plan
        from flashnorm.cli.progress import waiting

        given = None if plan is None else read_plan(plan)
        source, out = Path(adapter).expanduser(), Path(target).expanduser()
        onto = None if folded is None else Path(folded).expanduser()
        with waiting(f"folding {adapter}"):
            done = flashnorm.fold_adapter(source, given, out, base=base, folded=onto)
        added = f", {len(done.added)} added" if done.added else ""
        view = f"{target} is written: {len(done.changed)} tensors changed{added}"
        data = {"source": adapter, "target": target, **done.to_json()}
        return Result(data, view)

    run(command, Options(as_json, debug, quiet))


@app.command("verify", epilog=examples.of("verify"))
def verify_command(
    reference: Annotated[str, typer.Argument(metavar="A", help="The reference.")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="What should equal it.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to read instead of the shipped one.", metavar="FILE"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare the weights with what a fold of A makes.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read weights from disk while models run; by itself where one would not fit.",
        ),
    ] = None,
    inputs: Inputs = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Measure whether B computes what A computes: exit code 0 if it does, 1 if it does not.

    Each is a directory, a GGUF file or a hub id. With --quick, two directories: no model is run,
    and every tensor of B has to be, bit for bit, what `flashnorm fold` makes of A (with the same
    --inputs), in memory of a few blocks and at the disk's speed.
    """

    def command() -> Result:
        from flashnorm.cli.verify import run_quick, run_verify

        if quick:
            return run_quick(reference, candidate, text, inputs, engine, ray_address, stream, html)
        return run_verify(reference, candidate, text, inputs, engine, stream, html)

    run(command, Options(as_json, debug, quiet))


@app.command("bench", epilog=examples.of("bench"))
def bench_command(
    model: Model,
    dtype: Dtypes = None,
    variants: BenchVariants = "eager,flashnorm",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="How often each thing is timed.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded.")] = 32,
    context: Annotated[str, typer.Option(help="Tokens before them, as 64,2000,8000.")] = "64",
    prefill: Annotated[str, typer.Option(help="Token counts to prefill.")] = "16,64,512",
    memory: Annotated[
        bool, typer.Option(help="Measure memory, in processes of their own.")
    ] = False,
    engines: Engines = "",
    gguf: Annotated[
        str | None, typer.Option(help="What these read; {dtype} stands for the dtype.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Leave the weights of a GGUF file packed.")
    ] = False,
    cache: Annotated[
        int | None, typer.Option(help="Bytes that no cache holds; the largest cache if left.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PREFIX", help="Write PREFIX.json, .md and .png.")
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Time a model as transformers runs it and as flashnorm does, after checking that it is right.

    Under two minutes for a small model; what a longer run adds is said at the end. A bare
    config.json gets random weights. Leave the cores alone meanwhile.
    """

    def command() -> Result:
        from flashnorm.cli.bench import Asked, run_bench

        asked = Asked(
            model,
            dtype,
            variants,
            threads,
            rounds,
            tokens,
            context,
            prefill,
            memory,
            engines,
            gguf,
            packed,
        )
        return run_bench(asked, cache, out, html, as_json)

    run(command, Options(as_json, debug, quiet))


@app.command("tune", epilog=examples.of("tune"))
def tune_command(
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Measure which way to multiply is fastest on this machine, and remember it: half a minute.

    Models that are accelerated afterwards go by it. Leave the cores alone meanwhile.
    """

    def command() -> Result:
        from flashnorm.cli.tune import run_tune

        return run_tune(threads)

    run(command, Options(as_json, debug, quiet))


@app.command("eval", epilog=examples.of("eval"))
def eval_command(
    base: Model,
    folded: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDED", help="A folded checkpoint; MODEL folded in memory if left."
        ),
    ] = None,
    tasks: Tasks = "founding_perplexity,founding_continuation",
    dtype: StoredDtypes = None,
    variants: EvalVariants = "original,folded,accelerated",
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all if left.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences that are read at once.")] = 1,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task files of your own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PREFIX", help="Write PREFIX.json and PREFIX.md.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Run lm-evaluation-harness on a model, the same folded, and the same accelerated.

    The tasks that are shipped need no network. Needs lm_eval (extra `eval`).
    """

    def command() -> Result:
        from flashnorm.cli.evaluate import run_eval, settings

        asked = settings(base, folded, tasks, dtype, variants, limit, batch_size, include)
        return run_eval(asked, out)

    run(command, Options(as_json, debug, quiet))


@app.command("demo")
def demo_command(
    directory: Annotated[
        Path, typer.Option(help="Where the checkpoints are written (1.1 GB).")
    ] = Path("demo-output"),
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Fold a small real model and prove that nothing changed: about two minutes on a laptop."""

    def command() -> Result:
        from flashnorm.demo import run_demo

        console = stderr_console() if as_json or quiet else stdout_console()
        report = run_demo(directory.expanduser(), console=console)
        return Result(report.to_json(), report if quiet else None, 0 if report.ok else 1)

    run(command, Options(as_json, debug, quiet, f"{directory} keeps what is finished"))


@app.command("run", epilog=examples.of("run"), context_settings={"allow_interspersed_args": False})
def run_command(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND ...", help="What to run, as it is.")
    ],
    fold: Annotated[bool, typer.Option("--fold", help="Fold the gains first.")] = False,
    package: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep compiled decode steps there, and use them."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the summary as JSON, too.")
    ] = None,
    html: Html = None,
    quiet: Quiet = False,
    debug: Traceback = False,
) -> None:
    """Run a program; models that it loads by transformers' from_pretrained are accelerated.

    For the command itself and the Pythons that it starts. A model that cannot be accelerated runs
    as it is; a summary on stderr says so at the end. The exit code is the command's.
    """

    def program() -> Result:
        from flashnorm.cli.running import run_program

        return run_program(command, fold, package, report, html, quiet)

    run(program, Options(False, debug, quiet, foreign=True))


def _center(center: bool, centre: bool) -> bool:
    """Whether `--center` was given, perhaps by its old name."""
    from flashnorm.deprecated import old_name
    from flashnorm.warning import warn

    if centre:
        warn(old_name("--centre", "--center"), FutureWarning)
    return center or centre


def main() -> None:
    """The entry point of the console script."""
    app(prog_name="flashnorm")
