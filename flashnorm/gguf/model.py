"""A transformers model of a GGUF file, whose matrices stay packed as they lie in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashnorm.compat.transformers_names import dtypes, set_experts_
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.gguf.file import File, Stored, look, weight
from flashnorm.gguf.rearranged import Rows, rearrangement
from flashnorm.gguf.routes import Routes
from flashnorm.kernels.freed import give_back
from flashnorm.kernels.weights import DTYPES
from flashnorm.loading import locate, quiet_transformers, unreadable
from flashnorm.quantized.ggml import PLAIN
from flashnorm.quantized.packed_tensor import PackedTensor
from flashnorm.skeleton import complete_, empty_model, place_

_log = logging.getLogger("flashnorm")


@dataclass
class Loaded:
    """What became of the tensors of a file: formats of packed parameters, and why others are not.

    dense: parameters whose blocks had to be decoded. unused: tensors that the model has no use for.
    """

    packed: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = f"{len(self.packed)} weights stay packed"
        return said + (f", {len(self.dense)} had to be dequantized" if self.dense else "")


def loaded(model: nn.Module) -> Loaded | None:
    """What `load_gguf` did with the tensors of a file; None for any other model."""
    found: Loaded | None = getattr(model, "_flashnorm_gguf", None)
    return found


def load_gguf(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in a GGUF file, in the memory of the file, in eval mode on the CPU.

    Matrices stay in the blocks of the file, whatever their format, as `PackedTensor`: the same
    numbers as transformers' own loading gives, which dequantizes. Of what transformers does to a
    matrix, a new order of rows and a transpose keep it packed; after anything else it is dense, and
    the log says so. Vectors are dense, and so are matrices that are in `dtype` or float32 already.
    `path`: a file, or a directory that holds just one. `dtype`: what it computes in, float32,
    bfloat16 or float16.

    Raises FlashNormError where there is no such file, CheckpointError where it is damaged, of an
    architecture that transformers does not read, or lacks tensors of its model.
    """
    if dtype not in DTYPES:
        raise FlashNormError(f"load_gguf computes in float32, bfloat16 or float16, not in {dtype}")
    place = locate(path)
    if "gguf_file" not in place:
        raise FlashNormError(f"{os.fspath(path)} is no GGUF file: flashnorm.load_gguf reads those")
    with quiet_transformers():
        try:
            model = _load(place, dtype)
            give_back()
            return model
        except FlashNormError:
            raise
        except Exception as error:
            raise CheckpointError(unreadable(path, error)) from error


def _load(place: dict[str, str], dtype: torch.dtype) -> nn.Module:
    file = look(Path(place["pretrained_model_name_or_path"], place["gguf_file"]))
    described = _described(place)
    give_back()  # the vocabulary, before weights lie between what is left of it
    model = _empty(described, place, dtype)
    routes, dtype_of, found = Routes(file, model, described), dtypes(model, dtype), Loaded()
    for group in routes.groups(file.tensors):
        made = dict(_made(file, group, routes, dtype_of, found))
        for name, tensor in made.items():
            _check_shape(file, name, tensor, model)
            place_(model, name, tensor)
        if not made:
            found.unused += [stored.name for stored in group]
    complete_(model, str(file.path))
    if any(isinstance(p, PackedTensor) and p.dim() > 2 for p in model.parameters()):
        set_experts_(model.config, "eager")  # which takes one matrix after the other
    model._flashnorm_gguf = found
    for name, why in found.dense.items():
        _log.warning("%s of %s is dequantized: %s", name, file.path.name, why)
    _log.info("%s: %s", file.path.name, found)
    done: nn.Module = model.eval()
    return done


def _described(place: dict[str, str]) -> dict[str, Any]:
    """The config of a file, as transformers reads it from the metadata."""
    from transformers import PreTrainedConfig

    described: dict[str, Any] = PreTrainedConfig.get_config_dict(**place)[0]
    return described


def _empty(described: dict[str, Any], place: dict[str, str], dtype: torch.dtype) -> Any:
    """The model without memory for parameters, which are in float32 for now."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[described["model_type"]].from_dict(described)
    config.name_or_path = place["pretrained_model_name_or_path"]
    model = empty_model(config, dtype)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        place_(model, name, nn.Parameter(parameter.float(), requires_grad=False))
    return model


def _made(
    file: File, group: list[Stored], routes: Routes, dtype_of: Any, found: Loaded
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a group of tensors makes, packed where that can be."""
    why = _why_dense(group)
    rows = None if why or group[0].type == "f32" else _rows(group, routes)
    if rows is not None and _worth_packing(group[0], rows, dtype_of):
        values = [file.values(stored) for stored in group]
        every = values[0] if len(values) == 1 else torch.cat(values)
        for name, row in rows.items():
            found.packed[name] = group[0].type
            yield name, _packed(group[0], every, row, dtype_of(name))
        return
    made = routes.run({stored.name: file.numbers(stored).numpy() for stored in group})
    for name, tensor in made.items():
        if any(stored.quantized for stored in group):
            found.dense[name] = why or "transformers changes more than the order of its rows"
        yield name, _own(tensor.to(dtype_of(name)))


def _rows(group: list[Stored], routes: Routes) -> dict[str, Rows] | None:
    shapes = {stored.name: stored.shape for stored in group}
    try:
        with np.errstate(all="ignore"):  # of marks that are no numbers of a model
            return rearrangement(routes.run, shapes)
    except (ValueError, RuntimeError):  # it writes into what it is given, which cannot be
        return None


def _why_dense(group: list[Stored]) -> str:
    if any(len(stored.shape) < 2 for stored in group):
        return "it is a vector"
    if len({stored.type for stored in group}) > 1:
        return f"it is made of {' and '.join(sorted({stored.type for stored in group}))}"
    return ""


def _worth_packing(stored: Stored, rows: dict[str, Rows], dtype_of: Any) -> bool:
    """Plain numbers stay as they are where the dtype would take more memory."""
    own = PLAIN.get(stored.type)
    return own is None or all(own.itemsize < dtype_of(name).itemsize for name in rows)


def _packed(stored: Stored, every: Tensor, row: Rows, dtype: torch.dtype) -> PackedTensor:
    values = every if row.source is None else every[row.source]
    return PackedTensor(weight(stored, values), row.shape, dtype, row.turned)


def _own(tensor: Tensor) -> Tensor:
    """In memory that holds nothing else."""
    dense = tensor.detach().contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


def _check_shape(file: File, name: str, tensor: Tensor, model: nn.Module) -> None:
    expected = _held(model, name).shape
    if tensor.shape != expected:
        raise CheckpointError(
            f"{name} of {file.path} is {list(tensor.shape)}, and {list(expected)} by the metadata: "
            "the file is damaged, or written for another version of its architecture"
        )


def _held(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    held: Tensor = getattr(model.get_submodule(path), leaf)
    return held
