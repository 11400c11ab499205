"""The files of a checkpoint beside its tensors and config: tokenizer, templates, notes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashnorm.checkpoint.source import PICKLE_SUFFIXES, SINGLE

# Weights in any form would be those before the fold, so none is copied.
WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    *(".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite", ".ot"),
)
SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__"}


def other_files(source: Path, written: set[str]) -> tuple[str, ...]:
    """Paths relative to `source` of the files to copy, except those `written` by the fold."""
    found = (name for name in _walk(source) if not _is_weights(Path(name).name))
    return tuple(sorted(name for name in found if name not in written))


def weight_files(source: Path) -> tuple[str, ...]:
    """Paths relative to `source` of the files with weights in any form, indices too."""
    return tuple(sorted(name for name in _walk(source) if _is_weights(Path(name).name)))


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
