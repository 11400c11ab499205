"""What a compiled decode step stands on: code compiled ahead, guards, and the layers of caches."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from flashnorm.compat import torch_names, transformers_names
from tests.compat.checks import checks


class Counting(torch.nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return x * count


@cache
def library() -> str:
    """A library that multiplies by a number which it counts up where it is."""
    inputs = (torch.ones(3), torch.tensor(4))
    program = torch.export.export(Counting(), inputs, strict=True)
    place = str(Path(tempfile.mkdtemp()) / "counting.so")
    options = {"aot_inductor.output_path": place}
    made = torch_names.aot_compiler()(program.graph_module, inputs, options=options)
    assert isinstance(made, str)
    return made


@checks("torch._inductor.aot_compile")
def _aot_compiler() -> None:
    assert Path(library()).is_file()


@checks("torch._C._aoti.AOTIModelContainerRunnerCpu")
def _runner() -> None:
    runner, count = torch_names.PackageRunner(library(), 1), torch.tensor(6)
    (found,) = runner.run([torch.ones(3), count])
    assert found.eq(7).all()
    assert count == 7


@checks("torch._C._dynamo.guards.TensorGuards")
def _tensor_guards() -> None:
    square, vector = torch.nn.Parameter(torch.rand(4, 4)), torch.rand(3)
    free = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
    guards = torch_names.TensorGuards(square, vector, **free)
    assert guards.check(square, vector)
    assert guards.check(torch.nn.Parameter(torch.ones(4, 4)), torch.ones(3))
    others = [
        (square.data, vector),
        (torch.nn.Parameter(square.t()), vector),
        (square, vector.double()),
        (square, torch.rand(4)),
        (square, torch.rand(6)[::2]),
        (square, vector.to("meta")),
    ]
    assert not any(guards.check(*pair) for pair in others)


@checks("torch._C._dynamo.guards.dict_version")
def _dict_version() -> None:
    version, module = torch_names.dict_version, torch.nn.Linear(2, 2)
    changes = [
        lambda: module.train(not module.training),
        lambda: setattr(module, "weight", torch.nn.Parameter(torch.ones(2, 2))),
        lambda: module.register_forward_hook(lambda *_: None),
        lambda: module._parameters.pop("bias"),
        lambda: vars(module).update(in_features=3),
    ]
    for change in changes:
        held = [vars(module), module._parameters, module._forward_hooks]
        before = list(map(version, held))
        assert before == list(map(version, held))
        change()
        assert before != list(map(version, held))


def cache_of(kind: Any, **options: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
    )
    made = kind(config=config, **options)
    for index in range(2):
        made.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), index)
    return made


@checks("transformers.cache_utils.DynamicLayer")
def _growing() -> None:
    for layer in cache_of(transformers.DynamicCache).layers:
        assert type(layer) is transformers_names.growing_layer()
        layer.keys = torch.zeros(1, 1, 9, 4).narrow(2, 0, 5)  # what is put there is what it has
        assert layer.get_seq_length() == 5


@checks("transformers.cache_utils.StaticLayer")
def _fixed() -> None:
    for layer in cache_of(transformers.StaticCache, max_cache_len=6).layers:
        assert type(layer) is transformers_names.fixed_layer()
        assert layer.keys.shape == layer.values.shape == (1, 1, 6, 4)
        assert layer.cumulative_length.dtype == torch.int64
        assert layer.cumulative_length == 3
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        assert layer.cumulative_length == 4
        assert layer.keys[0, 0, :, 0].tolist() == [1, 1, 1, 0, 0, 0]


@checks("transformers.cache_utils.StaticSlidingWindowLayer")
def _window() -> None:
    """What it does with a token depends on whether it is full, and on nothing else of its count."""
    kind, count = transformers_names.window_layer(), transformers_names.WINDOW_COUNT
    assert issubclass(kind, transformers_names.fixed_layer())
    tokens = torch.arange(1.0, 9.0).view(1, 1, 8, 1)
    for start in (0, 1, 2, 3, 7):
        layer = kind(max_cache_len=3, sliding_window=3)
        for i in range(start):
            layer.update(tokens[:, :, i : i + 1], tokens[:, :, i : i + 1])
        held = [layer.keys, layer.values] if start else []
        assert vars(layer)[count] == start
        found = layer.update(tokens[:, :, start : start + 1], tokens[:, :, start : start + 1])
        assert vars(layer)[count] == start + 1
        assert all(a is b for a, b in zip(held, found, strict=False))  # written in place
        assert layer.cumulative_length == min(start + 1, 3)
        assert layer.keys.flatten().tolist() == [*range(max(1, start - 1), start + 2), 0, 0][:3]
