"""Tensors and operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat import torch_names
from tests.compat.checks import checks


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
    # Small numbers: without VNNI a CPU adds pairs of products in 16 bits, and ours runs none.
    q, w = (torch.randint(-8, 8, (32, 32), dtype=torch.int8) for _ in range(2))
    found = torch_names.int_mm(q, w.t())
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), q.long() @ w.long().t())


@checks("torch.ops.aten._foreach_add_.Scalar")
def _add_to_each() -> None:
    counts = [torch.tensor(3), torch.tensor([5])]
    assert torch_names.add_to_each(counts, 2) is None
    assert [int(count) for count in counts] == [5, 7]
    assert torch_names.add_to_each._schema.is_mutable


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
