"""Who watches operations, and the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashnorm.compat import torch_names
from tests.compat.checks import checks


class Noting(torch_names.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@checks(
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch._C._len_torch_dispatch_stack",
)
def _dispatch_modes() -> None:
    x = torch.ones(2)
    assert torch_names.count_dispatch_modes() == 0
    with Noting() as outer, Noting() as inner:
        assert torch_names.count_dispatch_modes() == 2
        x.mul(2)
        with torch_names.without_dispatch_modes():
            assert torch_names.count_dispatch_modes() == 0
            x.add(2)
        assert torch_names.count_dispatch_modes() == 2
    assert outer.seen == inner.seen == ["mul"]
    assert torch_names.count_dispatch_modes() == 0


@checks(
    "torch._C._len_torch_function_stack",
    "torch._C.DisableTorchFunction",
    "torch.overrides._get_current_function_mode_stack",
)
def _function_modes() -> None:
    before = torch_names.count_function_modes()
    with Listening() as mode:
        assert torch_names.count_function_modes() == before + 1
        assert torch_names.function_modes()[-1] is mode
        torch.add(1, torch.ones(1))
        with torch_names.without_torch_function():
            torch.mul(1, torch.ones(1))
    assert mode.seen == ["ones", "add"]
    assert torch_names.count_function_modes() == before


@checks("torch.utils._device.DeviceContext", "torch._GLOBAL_DEVICE_CONTEXT")
def _default_device() -> None:
    with torch.device("meta"):
        assert type(torch_names.function_modes()[-1]) is torch_names.DeviceContext
        assert torch_names.default_device() is None
    torch.set_default_device("meta")
    try:
        assert torch_names.default_device().device == torch.device("meta")
        assert type(torch_names.function_modes()[-1]) is torch_names.DeviceContext
    finally:
        torch.set_default_device(None)
    assert torch_names.default_device() is None


@checks("torch._C._get_tracing_state")
def _tracing() -> None:
    seen = []

    def traced(x: Tensor) -> Tensor:
        seen.append(torch_names.tracing_state())
        return x + 1

    torch.jit.trace(traced, torch.ones(1), check_trace=False)
    assert seen[0] is not None
    assert torch_names.tracing_state() is None


@checks("torch._C._is_any_autocast_enabled")
def _autocast() -> None:
    assert not torch_names.autocast_active()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_names.autocast_active()
    torch.set_autocast_enabled("cuda", True)  # needs no such device
    try:
        assert torch_names.autocast_active()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert not torch_names.autocast_active()


@checks("torch._C._functorch.peek_interpreter_stack", "torch._C._functorch.maybe_current_level")
def _functorch() -> None:
    def inside(x: Tensor) -> Tensor:
        assert torch_names.functorch_interpreter() is not None
        assert torch_names.functorch_level() is not None
        return x

    torch.func.vmap(inside)(torch.ones(2))
    torch.func.grad(lambda x: inside(x).sum())(torch.ones(2))
    assert torch_names.functorch_interpreter() is None
    assert torch_names.functorch_level() is None

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return x + 1 if torch_names.functorch_level() is None else x

    assert compiled(torch.ones(1)) == 2


@checks("torch.autograd.forward_ad._current_level")
def _forward_mode() -> None:
    assert torch_names.forward_ad._current_level < 0
    with torch_names.forward_ad.dual_level():
        assert torch_names.forward_ad._current_level == 0
    assert torch_names.forward_ad._current_level < 0


# The dispatcher.


@checks("torch._C.DispatchKey", "torch._C._dispatch_has_kernel_for_dispatch_key")
def _kernels() -> None:
    key = torch_names.DispatchKey.CompositeImplicitAutograd
    assert torch_names.has_kernel(torch.ops.aten.matmul.default.name(), key)
    assert not torch_names.has_kernel(torch.ops.aten.mm.default.name(), key)


@checks("torch._C._AutoDispatchBelowAutograd", "torch._C._after_autograd_keyset")
def _below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch_names.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
    keys, key = torch_names.after_autograd, torch_names.DispatchKey
    assert keys.has(key.CPU)
    assert not keys.has(key.AutogradCPU)
    assert (keys & keys).has(key.CPU)


@checks("torch.compiler._is_exporting_flag")
def _export_flag() -> None:
    seen = []

    class Noting(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch_names.export_flag())
            return x + 1

    torch.export.export(Noting(), (torch.ones(2),), strict=False)
    assert set(seen) == {True}
    assert not torch_names.export_flag()


@checks("torch._dynamo")
def _dynamo() -> None:
    config = torch_names.dynamo().config
    before = config.recompile_limit
    with config.patch(recompile_limit=before + 1, fail_on_recompile_limit_hit=True):
        assert config.recompile_limit == before + 1
    assert config.recompile_limit == before
    assert callable(torch_names.dynamo().reset)


@checks("torch._inductor.compile_fx.compile_fx")
def _graph_compiler() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("two", torch.full((2,), 2.0))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * self.two,)

    graph, x = torch.fx.symbolic_trace(Two()), torch.arange(2.0)
    options = {"cpp.threads": 1, "force_disable_caches": True}
    compiled = torch_names.graph_compiler()(graph, [x], config_patches=options)
    assert torch.equal(compiled(x)[0], 2 * x)


@checks(
    "torch._inductor.config", "torch._inductor.custom_graph_pass", "torch._guards.TracingContext"
)
def _graph_pass() -> None:
    seen: list[tuple[list[str], bool | None]] = []
    passes, config = torch_names.graph_passes(), torch_names.inductor_config()
    aware = getattr(passes, "CustomInferenceAwareGraphPass", None)

    class Noting(aware or passes.CustomGraphPass):
        def __call__(self, graph: Any, is_inference: bool | None = None) -> None:
            if aware is None:
                is_inference = not torch_names.TracingContext.try_get().fw_metadata.is_train
            seen.append(([str(node.target) for node in graph.nodes], is_inference))

        def uuid(self) -> str:
            return "noting"

    def compiled(x: Tensor) -> None:
        torch._dynamo.reset()
        torch.compile(lambda x: x @ x, backend="inductor", fullgraph=True)(x)

    with config.patch(post_grad_custom_post_pass=Noting(), force_disable_caches=True):
        compiled(torch.ones(2, 2))
        compiled(torch.ones(2, 2, requires_grad=True))
    assert [told for _, told in seen] == [True, False]
    assert all("aten.mm.default" in names for names, _ in seen)
    assert torch_names.TracingContext.try_get() is None
