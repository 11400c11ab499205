"""The files of a checkpoint beside its tensors and config: tokenizer, templates, notes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashnorm.checkpoint.source import PICKLE_SUFFIXES, SINGLE
from flashnorm.errors import CheckpointError

# Weights in any form would be those before the fold, so none is copied.
WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    *(".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite", ".ot"),
)
SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__"}


def other_files(source: Path, written: set[str]) -> tuple[str, ...]:
    """Paths relative to `source` of the files to copy, except those `written` by the fold."""
    found = (name for name in sorted(_walk(source)) if not _is_weights(Path(name).name))
    names = tuple(name for name in found if name not in written)
    for name in names:
        _check_link(source, name)
    return names


def weight_files(source: Path) -> tuple[str, ...]:
    """Paths relative to `source` of the files with weights in any form, indices too."""
    return tuple(sorted(name for name in _walk(source) if _is_weights(Path(name).name)))


def _check_link(source: Path, name: str) -> None:
    """Raise CheckpointError for a link that leads out of the checkpoint.

    Its target would be copied into what the user may publish; a checkpoint of somebody else can
    have links to anything. The hub's cache is made of links to the `blobs` in it.
    """
    place = (source / name).resolve()
    is_cached = place.parent.name == "blobs" and place.parts[-3].startswith("models--")
    if not is_cached and not place.is_relative_to(source.resolve()):
        raise CheckpointError(
            f"{name} in {source.name} is a link to {place}, outside of the checkpoint: put the "
            "file itself there if you mean it to be copied, or remove the link"
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy one file durably; its directory is made where it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _walk(source: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in SKIPPED_DIRECTORIES]
        for name in files:
            path = Path(directory, name)
            if path.is_file() and not name.startswith(".flashnorm"):
                yield str(path.relative_to(source))


def is_other(name: str) -> bool:
    """Whether a path inside of a checkpoint is a file beside its weights, or their index."""
    *folders, file = name.split("/")
    return SKIPPED_DIRECTORIES.isdisjoint(folders) and not _is_weights(file)


def _is_weights(name: str) -> bool:
    """Whether a file holds weights or is the index of files that do."""
    stem = name.removesuffix(".index.json")
    if stem == SINGLE:
        return name == SINGLE
    return stem.lower().endswith(WEIGHT_SUFFIXES)
