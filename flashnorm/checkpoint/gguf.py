"""GGUF as a source: dequantized by transformers into a safetensors checkpoint beside the target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashnorm.errors import CheckpointError

STAMP = ".flashnorm-gguf.json"  # written last: the directory is complete


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
    try:
        if not _is_complete(directory, stamp):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            _check_space(file, directory)
            _dequantize(file, directory)
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


def _dequantize(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read {file.name}: {error}") from error
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)  # the weights are plain now, and a stale mark stops every reader
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
