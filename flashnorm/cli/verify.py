"""What `flashnorm verify` runs: models, or with --quick a comparison of weights alone."""

from __future__ import annotations

from pathlib import Path

from flashnorm.cli.boundary import Result
from flashnorm.cli.options import known_engine
from flashnorm.errors import FlashNormError


def run_verify(
    reference: str,
    candidate: str,
    text: Path | None,
    inputs: list[Path] | None,
    engine: str,
    stream: bool | None,
    html: Path | None,
) -> Result:
    """Both models are run and compared."""
    import flashnorm
    from flashnorm.cli.inputs import read_text
    from flashnorm.cli.pages import promised
    from flashnorm.cli.progress import steps_bar

    if inputs:
        raise FlashNormError(
            "--inputs is for --quick, which records the model as the fold did; without --quick a "
            "text is read: use --text"
        )
    if known_engine(engine) != "local":
        raise FlashNormError("--engine ray compares weights, with --quick: models run here alone")
    page = promised(html)
    words = None if text is None else read_text(text)
    with steps_bar(f"loading {reference}") as report:
        found = flashnorm.verify(reference, candidate, text=words, stream=stream, progress=report)
    return Result(found.to_json(), found, 0 if found.ok else 1, page(found))


def run_quick(
    reference: str,
    candidate: str,
    text: Path | None,
    inputs: list[Path] | None,
    engine: str,
    ray_address: str | None,
    stream: bool | None,
    html: Path | None,
) -> Result:
    """No model is run: the weights of two checkpoints are compared."""
    import flashnorm
    from flashnorm.cli.inputs import read_inputs
    from flashnorm.cli.progress import bytes_bar

    if text is not None:
        raise FlashNormError("--quick runs no model, so it reads no text: leave out one of the two")
    if stream is not None:
        raise FlashNormError("--quick runs no model, and reads from disk: leave out --stream")
    if html is not None:
        raise FlashNormError("--html shows what models compute, and --quick runs none: use --json")
    given = read_inputs(inputs)
    with bytes_bar(f"recording {reference}") as report:
        found = flashnorm.verify_weights(
            reference,
            candidate,
            example_inputs=given,
            progress=report,
            engine=known_engine(engine),
            ray_address=ray_address,
        )
    return Result(found.to_json(), found, 0 if found.ok else 1)
