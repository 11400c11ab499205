"""GGUF as a source: dequantized by transformers into a safetensors checkpoint beside the target."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashnorm.checkpoint.workdir import own_directory
from flashnorm.content import AGAIN, why_damaged
from flashnorm.errors import CheckpointError
from flashnorm.gguf import header
from flashnorm.loading import dequantize_gguf

STAMP = ".flashnorm-gguf.json"  # written last: the directory is complete


def gguf_file(source: Path) -> Path | None:
    """The GGUF file that `source` is, or that it holds in place of a config.json."""
    if source.is_file():
        return source if source.suffix.lower() == ".gguf" else None
    if not source.is_dir() or (source / "config.json").exists():
        return None
    found = [file for file in source.iterdir() if file.suffix.lower() == ".gguf"]
    return found[0] if len(found) == 1 else None


@contextmanager
def dequantized(file: Path, target: Path) -> Iterator[Path]:
    """A temporary checkpoint directory with the weights of `file` in float32.

    Float32 because it holds every dequantized value exactly. Unlike the fold itself this step
    needs the whole model in memory. The directory goes when the fold ends, by success or by an
    error; after a kill it stays, and the next run goes on with it.
    """
    directory = target.parent / f".{target.name}.flashnorm-gguf"
    stat = file.stat()
    stamp = json.dumps([file.name, stat.st_size, stat.st_mtime_ns])
    own_directory(directory)  # another user's would be taken for what an earlier run has left
    try:
        if not _is_complete(directory, stamp):
            shutil.rmtree(directory, ignore_errors=True)
            own_directory(directory)
            _check_space(file, directory)
            dequantize_gguf(file, directory)
            (directory / STAMP).write_text(stamp)
        yield directory
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def _is_complete(directory: Path, stamp: str) -> bool:
    try:
        return (directory / STAMP).read_text() == stamp
    except OSError:
        return False


def _check_space(file: Path, directory: Path) -> None:
    """Room for the dequantized tensors and once more for the folded ones."""
    if damaged := why_damaged(file):
        raise CheckpointError(damaged)
    try:  # before transformers builds what the file asks for
        header.read(file)
    except (ValueError, struct.error, OSError, OverflowError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read as a GGUF file ({error}): it is damaged, {AGAIN}"
        ) from error
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(
            f"reading {file.name} needs the packages gguf, accelerate and sentencepiece: "
            "pip install 'flashnorm[gguf]'"
        ) from None
    try:
        elements = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:
        raise CheckpointError(f"{file.name} is not a GGUF file that gguf reads: {error}") from error
    needed, free = 2 * 4 * elements, shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"not enough space to dequantize and fold {file.name}: {needed} bytes are needed in "
            f"{directory.parent}, {free} are free"
        )
