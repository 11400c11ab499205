"""Every private name of torch and of transformers is there, and does what flashnorm relies on."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flashnorm
from flashnorm.compat import ATTRIBUTES, Private, torch_names, transformers_names
from tests.private_names import private_names

PACKAGE = Path(flashnorm.__file__).parent
ROWS = (*ATTRIBUTES, *torch_names.NAMES, *transformers_names.NAMES)
HERE = {"torch": torch.__version__, "transformers": transformers.__version__}
CHECKS: dict[str, Callable[[], object]] = {}


def checks(*theirs: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def keep(check: Callable[[], object]) -> Callable[[], object]:
        CHECKS.update(dict.fromkeys(theirs, check))
        return check

    return keep


def users(row: Private) -> list[str]:
    """The files that use what stands for the name, or the name itself where nothing does."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.is_relative_to(PACKAGE / "compat") and _uses(ast.parse(file.read_text()), row):
            found.append(str(file.relative_to(PACKAGE.parent)))
    return found


def _uses(tree: ast.AST, row: Private) -> bool:
    nodes = list(ast.walk(tree))
    if row.ours:
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        ours = [node for node in imports if f"{node.module}.".startswith("flashnorm.compat.")]
        return any(alias.name == row.ours for node in ours for alias in node.names)
    # An attribute, a method that is overridden, or a string that names either.
    said = {
        getattr(node, key, None)
        for node in nodes
        for key in ("attr", "name", "value")
        if isinstance(getattr(node, key, None), str)
    }
    return row.theirs.rpartition(".")[2] in said


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.theirs)
def test_private_name_does_what_we_rely_on(row):
    try:
        CHECKS[row.theirs]()
    except Exception as error:
        library = row.theirs.partition(".")[0]
        raise AssertionError(
            f"{row.theirs} of {library} {HERE[library]} is not what it was in "
            f"{', '.join(row.seen)} ({row.use}): {type(error).__name__}: {error}. "
            f"It is used as {row.ours or 'it is'} by {', '.join(users(row)) or 'nobody yet'}"
        ) from error


def test_every_row_has_a_check_and_every_check_a_row():
    assert sorted(CHECKS) == sorted({row.theirs for row in ROWS})


def test_a_failure_says_the_version_and_the_user(monkeypatch):
    row = next(row for row in ROWS if row.ours == "builder")
    monkeypatch.setitem(CHECKS, row.theirs, lambda: transformers.gone)
    said = rf"_from_config of transformers {transformers.__version__} is not what .*graph/build\.py"
    with pytest.raises(AssertionError, match=said):
        test_private_name_does_what_we_rely_on(row)


def resolve(theirs: str) -> Any:
    """The object of a name such as `torch.nn.Module._parameters`."""
    parts = theirs.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(theirs)


LATE = {"default_device", "hooks_of_all", "dynamo"}


@pytest.mark.parametrize("row", torch_names.NAMES, ids=lambda row: row.theirs)
def test_names_of_torch_are_the_very_objects(row):
    """A wrapper would take its time before every kernel; but for what is looked up late."""
    if row.ours not in LATE:
        assert getattr(torch_names, row.ours) is resolve(row.theirs)


@pytest.mark.parametrize("names", [torch_names, transformers_names], ids=["torch", "transformers"])
def test_compat_uses_the_names_of_its_rows_and_no_others(names):
    found = set(private_names(Path(names.__file__).read_text("utf-8")))
    rows = {row.theirs for row in names.NAMES} - {"torch.nn.modules.module._global_"}
    known = {name for name in found if not name.startswith(".")}
    attributes = {name.rpartition(".")[2] for name in found - known}
    assert {row for row in rows if row in known or row.rpartition(".")[2] in attributes} == rows
    assert known <= rows
    assert attributes <= {row.rpartition(".")[2] for row in rows}


def test_every_name_of_ours_is_defined_once():
    for names in (torch_names, transformers_names):
        assert all(hasattr(names, row.ours) for row in names.NAMES)
    assert len({row.theirs for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.theirs)
def test_every_row_is_used(row):
    assert users(row)


# Modules.


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


# Tensors and operations.


@checks("torch.Tensor._version")
def _version() -> None:
    x = torch.ones(2)
    before = x._version
    view = x[:1]
    view.add_(1)
    assert x._version == view._version == before + 1


@checks("torch.Tensor._base")
def _base() -> None:
    x = torch.ones(2)
    assert x._base is None
    assert x[:1]._base is x
    assert x[:1][:0]._base is x


@checks("torch.UntypedStorage._cdata")
def _cdata() -> None:
    x = torch.ones(2)
    number = x.untyped_storage()._cdata
    assert isinstance(number, int)
    assert x[1:].untyped_storage()._cdata == number
    assert x.clone().untyped_storage()._cdata != number


@checks("torch.ops.aten._schema")
def _schema() -> None:
    schema = torch.ops.aten.view.dtype._schema
    assert (schema.name, schema.overload_name) == ("aten::view", "dtype")
    assert not schema.is_mutable
    assert schema.arguments[0].alias_info is not None
    written = torch.ops.aten.add_.Tensor._schema
    assert [a.name for a in written.arguments] == ["self", "other", "alpha"]
    assert written.is_mutable
    assert written.arguments[2].default_value == 1
    assert written.arguments[0].alias_info.is_write
    assert written.arguments[1].alias_info is None


@checks("torch.Tensor._make_subclass")
def _make_subclass() -> None:
    x = nn.Parameter(torch.ones(2))
    made = torch_names.make_subclass(nn.Parameter, x.detach(), True)
    assert type(made) is nn.Parameter
    assert made is not x
    assert made.requires_grad
    assert made.data_ptr() == x.data_ptr()


class Inert(Tensor):
    __torch_function__ = torch_names.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.full((1,), len(func.overloadpacket.__name__))


@checks("torch.Tensor._make_wrapper_subclass", "torch._C._disabled_torch_function_impl")
def _make_wrapper_subclass() -> None:
    made = torch_names.make_wrapper_subclass(Inert, (1 << 40, 3), dtype=torch.float32)
    assert type(made) is Inert
    assert made.shape == (1 << 40, 3)
    assert made.dtype == torch.float32
    assert made.relu() == len("relu")  # it is given the operation, and no function before that


@checks("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
def _wrapper() -> None:
    class Two(Inert):
        def __tensor_flatten__(self) -> Any:
            return ["a"], None

        @staticmethod
        def __tensor_unflatten__(*_: Any) -> Any: ...

    asked = torch_names.is_traceable_wrapper_subclass
    assert asked(torch_names.make_wrapper_subclass(Two, (2,)))
    assert not asked(torch.ones(1))


@checks("torch._subclasses.fake_tensor.FakeTensor", "torch._subclasses.fake_tensor.FakeTensorMode")
def _fakes() -> None:
    mode, real = torch_names.FakeTensorMode(allow_non_fake_inputs=True), torch.ones(2, 2)
    with mode:
        fake = torch.empty(1 << 40, 2) @ real
    assert isinstance(fake, torch_names.FakeTensor)
    assert fake.shape == (1 << 40, 2)
    assert fake.device.type == "cpu"
    assert not fake.is_meta
    parameter = mode.from_tensor(nn.Parameter(real))
    assert isinstance(parameter, torch_names.FakeTensor)
    assert isinstance(parameter, nn.Parameter)


@checks("torch._int_mm")
def _int_mm() -> None:
    q, w = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    found = torch_names.int_mm(q, w.t())
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), q.long() @ w.long().t())


@checks("torch._scaled_mm")
def _scaled_mm() -> None:
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert {"scale_a", "scale_b", "out_dtype"} <= {*names}
    assert names[:2] == ["self", "mat2"]
    q, w = (torch.randn(16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    scales = {"scale_a": torch.tensor(2.0), "scale_b": torch.tensor(0.25)}
    found = torch_names.scaled_mm(q, w.t(), **scales, out_dtype=torch.float32)
    # float8 is exact in float32, and the scales are powers of two: sums of 16, in another order.
    torch.testing.assert_close(found, q.float() @ w.float().t() / 2, rtol=0, atol=1e-3)


@checks("torch.utils._pytree.tree_flatten", "torch.utils._pytree.tree_leaves")
def _leaves() -> None:
    nest = [1, {"a": (2, None)}]
    assert torch_names.tree_flatten(nest)[0] == torch_names.tree_leaves(nest) == [1, 2, None]


@checks("torch.utils._pytree.tree_map_only")
def _map_only() -> None:
    assert torch_names.tree_map_only(int, str, [1, {"a": (2.5, None)}]) == ["1", {"a": (2.5, None)}]


# Who watches.


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


@checks("torch._dynamo")
def _dynamo() -> None:
    config = torch_names.dynamo().config
    before = config.recompile_limit
    with config.patch(recompile_limit=before + 1, fail_on_recompile_limit_hit=True):
        assert config.recompile_limit == before + 1
    assert config.recompile_limit == before
    assert callable(torch_names.dynamo().reset)


# transformers.


SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


@checks("transformers.initialization.no_init_weights")
def _no_init_weights() -> None:
    x = torch.full((3,), 7.0)
    with transformers_names.no_init_weights():
        nn.init.zeros_(x)
        assert x.eq(7).all()
    nn.init.zeros_(x)
    assert x.eq(0).all()


@checks("transformers.PreTrainedModel._from_config")
def _builder() -> None:
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        model = transformers_names.builder(kind)(
            transformers.LlamaConfig(**SIZES), dtype=torch.bfloat16
        )
        assert type(model) is transformers.LlamaForCausalLM
        assert model.dtype == torch.bfloat16


@checks("transformers.AutoModelForCausalLM._model_mapping")
def _knows() -> None:
    assert transformers_names.knows(transformers.AutoModelForCausalLM, transformers.LlamaConfig())
    assert not transformers_names.knows(
        transformers.AutoModelForSeq2SeqLM, transformers.LlamaConfig()
    )
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        built = transformers_names.built_class(kind, transformers.LlamaConfig())
        assert built is transformers.LlamaForCausalLM


@checks("transformers.PreTrainedModel._init_weights")
def _initializer() -> None:
    model = llama()
    norm = model.model.norm
    norm.weight = nn.Parameter(torch.full((8,), torch.nan), requires_grad=False)
    with torch.no_grad():
        transformers_names.initializer(model)(norm)
    assert norm.weight.eq(1).all()
    assert transformers_names.initializer(nn.Linear(1, 1)) is None


@checks("transformers.PreTrainedConfig._name_or_path")
def _name_or_path() -> None:
    config = transformers.LlamaConfig(name_or_path="somewhere/model")
    assert transformers_names.name_or_path(config) == "somewhere/model"
    assert not transformers_names.name_or_path(transformers.LlamaConfig())
    assert not transformers_names.name_or_path(object())


@checks(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "transformers.core_model_loading.convert_and_load_state_dict_in_model",
    "transformers.modeling_utils.LoadStateDictConfig",
)
def _load() -> None:
    model, state = llama(), {k: torch.randn_like(v) for k, v in llama().state_dict().items()}
    wrong = "model.norm.weight"
    state[wrong] = torch.ones(3)
    rules = transformers_names.conversion_rules(model)
    info = transformers_names.load_state(model, state, rules)
    assert not info.conversion_errors
    assert [(name, *map(tuple, sizes)) for name, *sizes in info.mismatched_keys] == [
        (wrong, (3,), (8,))
    ]
    for name, value in model.state_dict().items():
        assert name == wrong or torch.equal(value, state[name]), name


@checks(
    "transformers.core_model_loading.WeightConverter",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.core_model_loading.rename_source_key",
)
def _names() -> None:
    model = llama()
    name_of = transformers_names.namer(model, transformers_names.conversion_rules(model))
    assert name_of("model.norm.weight") == name_of("norm.weight") == "model.norm.weight"
    experts = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=2)
    )
    name_of = transformers_names.namer(experts, transformers_names.conversion_rules(experts))
    stored = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    found = {name_of(stored.format(expert, part)) for expert in (0, 1) for part in (1, 3)}
    assert len(found) == 1
    assert found <= experts.state_dict().keys()


@checks("transformers.PreTrainedConfig._attn_implementation")
def _attention_of() -> None:
    model = llama()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert transformers_names.attention_of(model.config) == name


@checks(
    "transformers.PreTrainedModel._supports_sdpa",
    "transformers.PreTrainedModel._supports_attention_backend",
    "transformers.PreTrainedModel._can_set_attn_implementation",
)
def _can_replace_attention() -> None:
    model = llama()
    assert transformers_names.can_replace_attention(model)
    kind = transformers.LlamaForCausalLM
    for name in ("_supports_sdpa", "_supports_attention_backend", "_can_set_attn_implementation"):
        cls = type("Other", (kind,), {name: classmethod(bool) if "can" in name else False})
        model.__class__ = cls
        assert transformers_names.can_replace_attention(model) is ("can" in name)


@checks("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
def _attention_function() -> None:
    assert callable(transformers_names.attention_function("sdpa"))
    transformers.AttentionInterface.register("of_this_test", _hook)
    assert transformers_names.attention_function("of_this_test") is _hook


@checks("transformers.masking_utils.sdpa_mask")
def _sdpa_mask() -> None:
    masks = transformers.AttentionMaskInterface()
    assert masks["sdpa"] is transformers_names.sdpa_mask()


@checks(
    "transformers.generation.continuous_batching.continuous_api.ContinuousMixin",
    "transformers.generation.continuous_batching.continuous_api"
    ".ContinuousBatchingManager._original_attn_impl",
)
def _batching() -> None:
    mixin, model = transformers_names.batching(), llama()
    assert isinstance(model, mixin)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    manager = mixin.init_continuous_batching(model, continuous_batching_config=small)
    assert transformers_names.attention_of(model.config) in ("sdpa", "paged|sdpa")
    transformers_names.give_back_(manager, "eager")
    manager.start()
    manager.stop(block=True)
    assert transformers_names.attention_of(model.config) == "eager"


@checks("transformers.CompileConfig._compile_all_devices")
def _compile_everywhere() -> None:
    config, model = transformers.CompileConfig(), llama()
    settings = transformers.GenerationConfig(compile_config=config)
    cache = transformers.StaticCache(config=model.config, max_cache_len=4)
    compiles = model._valid_auto_compile_criteria
    assert not compiles({"past_key_values": cache}, settings)
    transformers_names.compile_everywhere_(config)
    assert compiles({"past_key_values": cache}, settings)
