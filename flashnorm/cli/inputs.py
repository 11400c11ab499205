"""What commands read besides models: `--inputs` (safetensors or JSON), plans and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.reading import parse_json

if TYPE_CHECKING:
    from flashnorm.plan import Plan

FORMATS = (
    "give tensors by the names of the forward's arguments in a .safetensors file, or a .json file "
    'such as {"input_ids": [[1, 2, 3]]}, or a list of such objects'
)


def read_inputs(files: Sequence[Path] | None) -> list[dict[str, Any]] | None:
    """Every set of inputs in the files, in order; None where none is given.

    In JSON lists of numbers are tensors (int64, float32 or bool), numbers, flags and texts are
    themselves. Raises FlashNormError for a file that holds none.
    """
    if not files:
        return None
    return [one for file in files for one in _read(file.expanduser())]


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".safetensors":
        return [_read_tensors(file)]
    try:
        data = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FlashNormError(
            f"{file} holds no inputs that can be read ({error}): {FORMATS}"
        ) from error
    sets = data if isinstance(data, list) else [data]
    if not sets or not all(isinstance(one, dict) for one in sets):
        raise FlashNormError(f"{file} holds no arguments by name: {FORMATS}")
    return [{name: _value(file, name, item) for name, item in one.items()} for one in sets]


def _read_tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from flashnorm.checkpoint.header import read_header

    try:
        read_header(file)
        return load_file(file)
    except (OSError, SafetensorError, CheckpointError, KeyError, ValueError) as error:
        raise FlashNormError(
            f"{file} holds no inputs that can be read ({error}): {FORMATS}"
        ) from error


def _value(file: Path, name: str, item: Any) -> Any:
    import torch

    if isinstance(item, dict):
        return {key: _value(file, f"{name}.{key}", part) for key, part in item.items()}
    if not isinstance(item, list):
        return item
    try:
        return torch.tensor(item)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FlashNormError(f"{file}: {name} is no tensor ({error}): {FORMATS}") from error


def read_plan(file: Path) -> Plan:
    """The plan that `inspect --json` or `fold --json` printed."""
    from flashnorm.plan import Plan

    try:
        data = parse_json(read_text(file))
        return Plan.from_json(data.get("plan", data))
    except (ValueError, AttributeError) as error:
        raise FlashNormError(
            f"{file} holds no plan that can be read ({error}): write one with flashnorm inspect "
            "--json"
        ) from error


def read_text(file: Path) -> str:
    """A file's text. Raises FlashNormError where it is no UTF-8."""
    try:
        return file.expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise FlashNormError(f"{file} cannot be read as UTF-8 text: {error}") from error
