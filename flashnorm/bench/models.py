"""The models to measure: loaded or made from a config, copied without their weights, counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.checkpoint.origin import open_origin
from flashnorm.compat.transformers_names import builder
from flashnorm.errors import FlashNormError
from flashnorm.gguf import load_gguf
from flashnorm.kernels import measurements
from flashnorm.loading import load_model, load_tokenizer, model_class, quiet_transformers
from flashnorm.quantized.packed_tensor import PackedTensor
from flashnorm.runtime.package.options import Package
from flashnorm.verification.inputs import token_samples, writes_tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SEED = 0
SPREAD = 0.1  # of random gains and biases


def is_config(source: str) -> bool:
    """Whether `source` is a config alone, so that the weights are random."""
    return Path(source).expanduser().is_file() and source.endswith(".json")


def open_model(source: str, dtype: str, packed: bool = False) -> nn.Module:
    """The model that `source` names, in `dtype`; a bare config.json gives it random weights.

    packed: it is a GGUF file whose weights stay as they are.

    Raises FlashNormError where nothing is there, or where the model writes no tokens.
    """
    wanted = DTYPES[dtype]
    if packed:
        model = load_gguf(source, wanted)
    else:
        model = _random(source, wanted) if is_config(source) else load_model(source, wanted)
    if not writes_tokens(model):
        raise FlashNormError(
            f"{source} does not continue text, so there is no decoding to measure: give a causal "
            "language model"
        )
    return model.eval()


def _random(source: str, dtype: torch.dtype) -> nn.Module:
    config = open_origin(source).config
    auto = model_class(config)
    build = builder(auto)
    torch.manual_seed(SEED)
    with quiet_transformers():
        model: nn.Module = build(config, dtype=dtype)
    with torch.no_grad():  # gains of one and biases of zero would hide errors
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model


def token_ids(source: str, model: nn.Module, count: int) -> Tensor:
    """[count] tokens of the shipped text; random ones where there is no tokenizer."""
    tokenizer = None if is_config(source) else load_tokenizer(source)
    ids = token_samples(model, tokenizer, None, count, 1).ids
    assert ids is not None
    return ids.repeat(-(-count // len(ids)))[:count]


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are those of `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def accelerated_copy(model: nn.Module, package: int = 0) -> nn.Module:
    """A copy that shares its weights with `model` and runs on flashnorm's kernels."""
    return accelerate(sharing_copy(model), package)


def accelerate(model: nn.Module, package: int = 0) -> nn.Module:
    """`flashnorm.accelerate_`, found when it is called; with a package, in the user's cache folder,
    where it is for so many tokens."""
    import flashnorm

    if not package:
        done: nn.Module = flashnorm.accelerate_(model)
        return done
    asked = flashnorm.Package(measurements.folder() / "packages", length=package)
    return flashnorm.accelerate_(model, package=asked)


def package_length(tokens: int) -> int:
    """For how many tokens a package is made that has to take so many: few lengths, so few files."""
    return -(-tokens // Package.length) * Package.length


def parameter_bytes(model: nn.Module) -> int:
    return sum(map(_bytes, model.parameters()))


def token_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decoded token reads: each parameter once.

    Tables are not counted, because a token reads one row of them, but for those that another
    module multiplies with (a tied head). Every expert of a mixture is counted, read or not.
    """
    read: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            read |= {id(own): own for own in module.parameters(recurse=False)}
    return sum(map(_bytes, read.values()))


def _bytes(tensor: Tensor) -> int:
    """Of the memory that holds its numbers."""
    return (tensor.packed if isinstance(tensor, PackedTensor) else tensor).nbytes
