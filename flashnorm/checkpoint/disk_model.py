"""A model whose matrices stay in the files of its checkpoint: for models larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.checkpoint.config import check_not_quantized
from flashnorm.checkpoint.disk_rows import DiskTensor, OpenShards, disk_tensor
from flashnorm.checkpoint.engine import absent_gains
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.mapping import Mapped, map_parameters
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.checkpoint.values import read_parameter
from flashnorm.compat.transformers_names import dtypes, set_experts_
from flashnorm.loading import quiet_transformers
from flashnorm.marker import is_strict
from flashnorm.skeleton import complete_, empty_model, place_

# Weights of fewer bytes are loaded: reading them again for every use would not be worth it.
SMALL = 1 << 20

Absent = dict[str, tuple[tuple[int, ...], torch.dtype, float]]


@contextmanager
def opened_on_disk(path: Path, told: Callable[[int], None] | None = None) -> Iterator[nn.Module]:
    """The model of a checkpoint directory, in eval mode on the CPU, as long as the context lasts.

    It computes what `from_pretrained` would give, in the stored dtype. Weights with two or more
    axes and at least `SMALL` bytes are `DiskTensor`s, the others are in memory; experts are
    computed one after the other. `told` is called with the bytes of tensors read so far.

    Raises CheckpointError where the directory is not sound, or lacks tensors of its model, and
    QuantizedError where its weights are quantized.
    """
    source = open_source(path)
    check_not_quantized(source.config)
    shards = OpenShards(source, told)
    try:
        with quiet_transformers():
            yield _model(source, shards)
    finally:
        shards.close()


def _model(source: Source, shards: OpenShards) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path)
    dtype = _stored_dtype(config, source)
    model = empty_model(config, dtype)
    dtype_of = dtypes(model, dtype)
    absent = _absent(source)
    shapes = {name: place.entry.shape for name, place in source.where.items()}
    mapped = map_parameters(source, shapes=shapes | {name: a[0] for name, a in absent.items()})
    for name, value in _values(model, source, shards, mapped, absent, dtype_of):
        place_(model, name, value)
    complete_(model, str(source.path))
    set_experts_(model.config, "eager")  # which takes one matrix after the other
    done: nn.Module = model.eval()
    return done


def _values(
    model: nn.Module,
    source: Source,
    shards: OpenShards,
    mapped: Mapped,
    absent: Absent,
    dtype_of: Callable[[str], torch.dtype],
) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoint holds for the model, name by name."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    for name, tensor in [*parameters, *buffers]:
        if name not in mapped.provenances and name not in mapped.problems:
            continue
        provenance = mapped[name]
        dtype = dtype_of(name) if tensor.is_floating_point() else tensor.dtype
        if provenance.tensors[0] in absent:
            yield name, torch.full(provenance.shape, absent[provenance.tensors[0]][2], dtype=dtype)
        elif _stays(tensor) and all(_is_float(source, part) for part in provenance.tensors):
            yield name, disk_tensor(shards, provenance, dtype)
        else:
            yield name, read_parameter(source, provenance).to(dtype, copy=True)


def _stays(tensor: Tensor) -> bool:
    """Whether a weight stays in its file; `tensor` is without memory."""
    return tensor.is_meta and tensor.is_floating_point() and tensor.ndim > 1 and _large(tensor)


def _large(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize >= SMALL


def _is_float(source: Source, name: str) -> bool:
    return source.where[name].entry.dtype in FLOAT_DTYPES


def _absent(source: Source) -> Absent:
    """The gains that a strict fold left out."""
    if not is_strict(source.config):
        return {}
    return absent_gains(source.path, source, "its marker")


def _stored_dtype(config: Any, source: Source) -> torch.dtype:
    """What `from_pretrained` takes for "auto": the config's dtype, else the first tensor's."""
    named = getattr(config, "dtype", None)
    if named is not None:
        found: torch.dtype = getattr(torch, named) if isinstance(named, str) else named
        return found
    for header in source.shards.values():
        for entry in header.entries:
            if entry.dtype in FLOAT_DTYPES:
                return FLOAT_DTYPES[entry.dtype]
    return torch.float32


def on_disk(model: nn.Module) -> dict[str, DiskTensor]:
    """The weights of a model that are in files, by every name that they have."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: held for name, held in named if isinstance(held, DiskTensor)}
