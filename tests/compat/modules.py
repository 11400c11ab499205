"""Attributes and hooks of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashnorm.compat import torch_names
from tests.compat.checks import checks


def _hook(*_: Any, **__: Any) -> None:
    return None


@checks("torch.nn.Module._parameters")
def _parameters() -> None:
    module = nn.Linear(2, 3, bias=False)
    assert module._parameters == {"weight": module.weight, "bias": None}
    other = nn.Parameter(torch.ones(3, 2))
    module._parameters["weight"] = other
    assert module.weight is other
    assert vars(module)["_parameters"] is module._parameters


@checks("torch.nn.Module._buffers")
def _buffers() -> None:
    module = nn.BatchNorm1d(2, track_running_stats=False)
    assert module._buffers["running_mean"] is None
    module.register_buffer("more", torch.ones(1))
    assert module._buffers["more"] is module.more


@checks("torch.nn.Module._modules")
def _modules() -> None:
    module = nn.Sequential(nn.Identity(), nn.Tanh())
    assert list(module._modules) == ["0", "1"]
    assert module._modules["1"] is module[1]
    module._modules["1"] = other = nn.ReLU()
    assert module[1] is other


@checks(
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_hooks_with_kwargs",
    "torch.nn.Module._forward_hooks_always_called",
)
def _forward_hooks() -> None:
    module, other = nn.Identity(), nn.Identity()
    held = [
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    assert not any(held)
    handle = module.register_forward_hook(_hook, with_kwargs=True, always_call=True)
    assert [list(hooks) for hooks in held] == [[handle.id]] * 3
    other.__dict__["_forward_hooks"] = module._forward_hooks
    handle.remove()
    assert not any(held)
    assert not other._forward_hooks


@checks("torch.nn.Module._forward_pre_hooks", "torch.nn.Module._forward_pre_hooks_with_kwargs")
def _forward_pre_hooks() -> None:
    module = nn.Identity()
    held = [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs]
    assert not any(held)
    handle = module.register_forward_pre_hook(_hook, with_kwargs=True)
    assert [list(hooks) for hooks in held] == [[handle.id]] * 2
    handle.remove()
    assert not any(held)


@checks(
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
    "torch.nn.Module._is_full_backward_hook",
)
def _backward_hooks() -> None:
    module = nn.Identity()
    assert module._is_full_backward_hook is None
    assert "_is_full_backward_hook" in vars(module)
    handles = [
        module.register_full_backward_hook(_hook),
        module.register_full_backward_pre_hook(_hook),
    ]
    assert list(module._backward_hooks) == [handles[0].id]
    assert list(module._backward_pre_hooks) == [handles[1].id]
    assert module._is_full_backward_hook is True


@checks("torch.nn.Module._compiled_call_impl")
def _compiled_call_impl() -> None:
    module = nn.Identity()
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert callable(vars(module)["_compiled_call_impl"])
    del vars(module)["_compiled_call_impl"]
    assert module(1) == 1


@checks("torch.nn.Module._save_to_state_dict", "torch.nn.Module._load_from_state_dict")
def _state_dict() -> None:
    class Norm(nn.Module):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "more"] = torch.ones(1)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            assert state_dict.pop(prefix + "more") == 1
            super()._load_from_state_dict(state_dict, prefix, *args)

    module = nn.ModuleDict({"norm": Norm()})
    assert list(module.state_dict()) == ["norm.more"]
    module.load_state_dict(module.state_dict())


@checks("torch.compile._orig_mod")
def _orig_mod() -> None:
    module = nn.Identity()
    compiled = torch.compile(module, backend="eager")
    assert compiled._modules["_orig_mod"] is module
    assert "dynamo_ctx" in vars(compiled)


@checks(
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
)
def _hooks_of_all() -> None:
    after, before = torch_names.forward_hooks_of_all, torch_names.forward_pre_hooks_of_all
    handles = [
        nn.modules.module.register_module_forward_hook(_hook),
        nn.modules.module.register_module_forward_pre_hook(_hook),
    ]
    assert (list(after), list(before)) == ([handles[0].id], [handles[1].id])
    for handle in handles:
        handle.remove()
    assert not after
    assert not before
    assert nn.modules.module._global_forward_hooks is after
    assert nn.modules.module._global_forward_pre_hooks is before


@checks("torch.nn.modules.module._global_")
def _all_hooks_of_all() -> None:
    assert not any(torch_names.hooks_of_all())
    register = [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_parameter_registration_hook,
    ]
    handles = [each(_hook) for each in register]
    try:
        assert sum(map(len, torch_names.hooks_of_all())) == len(handles)
    finally:
        for handle in handles:
            handle.remove()
        nn.modules.module._global_is_full_backward_hook = None
    assert not any(torch_names.hooks_of_all())


@checks("torch.nn.modules.conv._ConvNd")
def _convolutions() -> None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    assert all(issubclass(kind, torch_names.ConvNd) for kind in kinds)
    assert torch_names.ConvNd not in nn.Linear.__mro__
    assert nn.Conv2d(2, 2, 1).groups == 1
