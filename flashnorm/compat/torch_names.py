"""Private names of torch, under names that say what they are for. Never a wrapper around a call.

What is asked before every kernel must stay the very function of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext as TracingContext
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad as forward_ad  # `_current_level` changes: it is read there
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext as DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

from flashnorm.compat import Private

# Who watches, or wants torch's own operations.
count_dispatch_modes = torch._C._len_torch_dispatch_stack
count_function_modes = torch._C._len_torch_function_stack
function_modes = _get_current_function_mode_stack
tracing_state = torch._C._get_tracing_state
autocast_active = torch._C._is_any_autocast_enabled
functorch_interpreter = torch._C._functorch.peek_interpreter_stack
functorch_level = torch._C._functorch.maybe_current_level
forward_hooks_of_all = nn.modules.module._global_forward_hooks
forward_pre_hooks_of_all = nn.modules.module._global_forward_pre_hooks

# How not to be watched.
without_dispatch_modes = _disable_current_modes
without_torch_function = torch._C.DisableTorchFunction
no_torch_function = torch._C._disabled_torch_function_impl

# Tensors, and the operations on them.
make_subclass = torch.Tensor._make_subclass
make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
scaled_mm = torch._scaled_mm
int_mm = torch._int_mm
add_to_each = torch.ops.aten._foreach_add_.Scalar
ConvNd = nn.modules.conv._ConvNd

# Code that was compiled ahead of time.
PackageRunner = torch._C._aoti.AOTIModelContainerRunnerCpu

# What a compiled graph asks whether anything is new.
TensorGuards = torch._C._dynamo.guards.TensorGuards
dict_version = torch._C._dynamo.guards.dict_version

# The dispatcher.
DispatchKey = torch._C.DispatchKey
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
below_autograd = torch._C._AutoDispatchBelowAutograd
after_autograd = torch._C._after_autograd_keyset


def default_device() -> Any:
    """The context that `torch.set_default_device` has left, with its `device`; or None.

    That is less than a context around us says.
    """
    return getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)


def hooks_of_all() -> list[dict[int, Any]]:
    """The dicts of the hooks that are on every module of the process."""
    space = vars(nn.modules.module)  # a flag of theirs begins like them
    return [
        held
        for name, held in space.items()
        if name.startswith("_global_") and isinstance(held, dict)
    ]


def export_flag() -> bool:
    """Whether torch.export runs. `torch.compiler.is_exporting()` says so in every graph of 2.11."""
    return torch.compiler._is_exporting_flag


def dynamo() -> Any:
    """What torch.compile captures graphs with; imported late, because it takes seconds."""
    from torch import _dynamo

    return _dynamo


def inductor_config() -> Any:
    """The options of torch.compile's compiler, for this thread. Imported late."""
    from torch._inductor import config

    return config


def graph_passes() -> Any:
    """The classes of what it calls with its graphs. Imported late."""
    from torch._inductor import custom_graph_pass

    return custom_graph_pass


def graph_compiler() -> Any:
    """`compile_fx(graph, inputs, config_patches=)`: what Dynamo traced, compiled. Imported late."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def aot_compiler() -> Any:
    """`aot_compile(graph, inputs, options=)`: a graph becomes a shared library. Imported late."""
    from torch._inductor import aot_compile

    return aot_compile


_FAKE, _MODES = "torch._subclasses.fake_tensor", "torch.utils._python_dispatch"

NAMES = (
    Private(f"{_FAKE}.FakeTensor", "FakeTensor", "a tensor without memory"),
    Private(f"{_FAKE}.FakeTensorMode", "FakeTensorMode", "within it tensors are made without"),
    Private(f"{_MODES}.TorchDispatchMode", "TorchDispatchMode", "is given every operation"),
    Private(f"{_MODES}._disable_current_modes", "without_dispatch_modes", "nobody is given any"),
    Private(
        f"{_MODES}.is_traceable_wrapper_subclass",
        "is_traceable_wrapper_subclass",
        "whether a tensor is made of others and has no memory of its own",
    ),
    Private("torch.utils._device.DeviceContext", "DeviceContext", "the mode of a default device"),
    Private(
        "torch.overrides._get_current_function_mode_stack",
        "function_modes",
        "the active TorchFunctionModes",
    ),
    Private("torch.utils._pytree.tree_flatten", "tree_flatten", "the leaves, and how they stood"),
    Private("torch.utils._pytree.tree_leaves", "tree_leaves", "the leaves of a nest"),
    Private("torch.utils._pytree.tree_map_only", "tree_map_only", "one type of them replaced"),
    Private(
        "torch._C._len_torch_dispatch_stack",
        "count_dispatch_modes",
        "how many TorchDispatchModes are active",
    ),
    Private(
        "torch._C._len_torch_function_stack",
        "count_function_modes",
        "how many TorchFunctionModes are active",
    ),
    Private("torch._C._get_tracing_state", "tracing_state", "None unless torch.jit traces"),
    Private("torch._C._is_any_autocast_enabled", "autocast_active", "for any device"),
    Private(
        "torch._C._functorch.peek_interpreter_stack",
        "functorch_interpreter",
        "None outside of torch.func's transforms",
    ),
    Private(
        "torch._C._functorch.maybe_current_level",
        "functorch_level",
        "None outside of torch.func's transforms, in a compiled graph too",
    ),
    Private(
        "torch.nn.modules.module._global_forward_hooks",
        "forward_hooks_of_all",
        "the one dict of the hooks after any module's forward",
    ),
    Private(
        "torch.nn.modules.module._global_forward_pre_hooks",
        "forward_pre_hooks_of_all",
        "the one dict of the hooks before any module's forward",
    ),
    Private(
        "torch.nn.modules.module._global_",
        "hooks_of_all",
        "how the names begin of all dicts of hooks that are on every module",
    ),
    Private(
        "torch._C.DisableTorchFunction",
        "without_torch_function",
        "within it nobody is given a function",
    ),
    Private(
        "torch._C._disabled_torch_function_impl",
        "no_torch_function",
        "the __torch_function__ of a subclass that has none",
    ),
    Private("torch.Tensor._make_subclass", "make_subclass", "another object for the same memory"),
    Private(
        "torch.Tensor._make_wrapper_subclass",
        "make_wrapper_subclass",
        "a tensor of a subclass, with a shape and without memory",
    ),
    Private("torch._scaled_mm", "scaled_mm", "a product of float8 with scales"),
    Private("torch._int_mm", "int_mm", "the exact product of int8 in int32"),
    Private(
        "torch.ops.aten._foreach_add_.Scalar",
        "add_to_each",
        "adds a number to each tensor of a list, in place; in a compiled graph by one kernel",
    ),
    Private("torch.nn.modules.conv._ConvNd", "ConvNd", "the base class of all convolutions"),
    Private("torch._C.DispatchKey", "DispatchKey", "the keys of the dispatcher by name"),
    Private(
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        "has_kernel",
        "whether an operation has a kernel of its own for a key",
    ),
    Private(
        "torch._C._AutoDispatchBelowAutograd",
        "below_autograd",
        "within it an operation has no gradient",
    ),
    Private("torch._C._after_autograd_keyset", "after_autograd", "the keys that come after it"),
    Private(
        "torch._GLOBAL_DEVICE_CONTEXT",
        "default_device",
        "where torch.set_default_device keeps its context, for each thread",
    ),
    Private("torch.compiler._is_exporting_flag", "export_flag", "true while torch.export runs"),
    Private(
        "torch._C._aoti.AOTIModelContainerRunnerCpu",
        "PackageRunner",
        "runs a library of aot_compile: a list of tensors for a list of tensors",
    ),
    Private(
        "torch._C._dynamo.guards.TensorGuards",
        "TensorGuards",
        "`check(*tensors)`: as those that it was made of, by type, dtype, sizes, strides, device",
    ),
    Private(
        "torch._C._dynamo.guards.dict_version",
        "dict_version",
        "a number that is another one once a dict has another value or key",
    ),
    Private(
        "torch._inductor.config",
        "inductor_config",
        "`post_grad_custom_post_pass` is called with every graph, before it is lowered",
    ),
    Private(
        "torch._inductor.custom_graph_pass",
        "graph_passes",
        "`CustomGraphPass` is what such a pass has to be, for compiled graphs to be kept",
    ),
    Private(
        "torch._guards.TracingContext",
        "TracingContext",
        "`try_get()` is what is compiled now; torch 2.11: `fw_metadata.is_train`",
    ),
    Private(
        "torch._inductor.compile_fx.compile_fx",
        "graph_compiler",
        "compiles a graph of Dynamo's that holds buffers of its own, with options of its own",
    ),
    Private("torch._inductor.aot_compile", "aot_compiler", "writes a shared library for a graph"),
    Private("torch._dynamo", "dynamo", "limits of recompilation, and how to forget graphs"),
)
