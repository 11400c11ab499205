"""Packed layers are recorded as x Wᵀ + c, analysed like dense ones, and never written to."""

import dataclasses

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.errors import TraceError
from flashnorm.graph.fusible import find_fusible
from flashnorm.graph.packed import named
from flashnorm.graph.recording import record
from flashnorm.plan import Plan
from flashnorm.planner import make_plan
from flashnorm.quantized import layout
from tests.quantized.columns import GptqLinear
from tests.quantized.models import GROUP, ORIGINS, N, Toy, rows, toy


def names(fusible):
    """What was found, by modules: buffers and parameters have names of their own."""
    return {
        "linears": {path: bool(linear.bias) for path, linear in fusible.linears.items()},
        "gated": fusible.gated,
        "norms": fusible.norms,
        "readers": fusible.readers,
        "kept": fusible.kept,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_packed_model_is_recorded_as_a_dense_one(origin, dtype):
    x = rows(2, 3, N, dtype=dtype)
    dense, model = record(toy(dtype), (x,)), ORIGINS[origin](toy(dtype))
    graph = record(model, (x,))
    assert names(find_fusible(graph)) == names(find_fusible(dense))
    assert [n.op for n in graph.nodes] == [n.op for n in dense.nodes]
    assert len(graph.packed) == 8
    for path in ("q", "mlp.down", "head"):
        held = layout.find(model.get_submodule(path))
        value = graph.values[graph.parameters[f"{path}.{held.weight}"]]
        assert graph.packed[f"{path}.{held.weight}"] == held.origin
        assert value.shape == held.read(model.get_submodule(path)).shape
        assert value.dtype.is_floating_point


def state(model):
    """All that recording must leave as it was."""
    found = []
    for path, module in model.named_modules():
        held = layout.find(module)
        tensors = held.tensors(module) if isinstance(held, layout.Held) else ()
        own = [*module._parameters.items(), *module._buffers.items()]
        plain = sorted(name for name in vars(module) if not name.startswith("_flashnorm"))
        found += [(path, type(module), plain, [(n, id(t)) for n, t in own])]
        found += [(t.data_ptr(), layout.version(t), t.clone()) for t in tensors]
        found += [list(module._forward_pre_hooks), vars(module).get("forward")]
    return found


def same(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        if isinstance(one, tuple) and isinstance(one[-1], torch.Tensor):
            assert one[:2] == other[:2]
            assert torch.equal(one[2], other[2])
        else:
            assert one == other


class Fails(Toy):
    def forward(self, x):
        super().forward(x)
        raise ValueError("after all layers")


class Asks(Toy):
    """It asks for a value, so that it is recorded on real tensors."""

    def forward(self, x):
        y = super().forward(x)
        return y if bool(y.isfinite().all()) and float(y.abs().max()) > 0 else self.missing


@pytest.mark.parametrize("origin", ORIGINS)
def test_recording_leaves_the_model_as_it_was(origin):
    model = ORIGINS[origin](toy())
    for kind in (Toy, Asks, Fails):
        model.__class__ = kind
        before = state(model)
        if kind is Fails:
            with pytest.raises(TraceError, match="after all layers"):
                record(model, (rows(2, N),))
        else:
            assert record(model, (rows(2, N),)).packed
        same(before, state(model))


@pytest.mark.parametrize("origin", ["torchao int8", "compressed-tensors int4", "gptq"])
def test_values_of_a_real_recording_are_those_of_the_packed_weights(origin):
    model, seen = ORIGINS[origin](toy()), []

    class Shows(Toy):
        def forward(self, x):
            y = super().forward(x)
            seen.append(float(y.abs().sum()))  # a fake tensor has no such number
            return y

    model.__class__ = Shows
    x = rows(2, N)
    graph = record(model, (x,))
    assert len(find_fusible(graph).linears) == 8
    model.__class__ = Toy
    expected = float(model(x).abs().sum())
    assert abs(seen[-1] - expected) <= 1e-4 * expected


@pytest.mark.parametrize("origin", ORIGINS)
def test_nothing_is_folded_into_packed_weights(origin):
    model = ORIGINS[origin](toy())
    plan = flashnorm.inspect(model, (rows(2, N),), center=True)
    assert [site.gain_state for site in plan.sites] == ["kept"] * 3
    assert not plan.folded
    assert not plan.centerings
    held, where = layout.find(model.q), ("q", "mlp.gate", "head")
    for site, path in zip(plan.sites, where, strict=True):
        assert f"{path}.{held.weight} is quantized ({held.origin})" in site.reason
        assert "the norm is deferred into it by accelerate_" in site.reason
        assert f"{path}.{held.weight}" in site.quantized
        assert site.scale in ("kept", "deferred")
    assert len(plan.sites[0].quantized) == 3
    assert f"8 weights are quantized ({held.origin})" in plan.notes[-1]
    assert "defers 3 norms into them" in plan.notes[-1]
    assert Plan.from_json(plan.to_json()) == plan
    before = state(model)
    flashnorm.fold_(model, (rows(2, N),))
    same(before, state(model))


def test_a_plan_of_some_quantized_readers_folds_the_others():
    model = toy()
    model.head = GptqLinear.of(model.head, GROUP)
    plan = flashnorm.inspect(model, (rows(2, N),))
    assert [site.gain_state for site in plan.sites] == ["folded", "folded", "kept"]
    model.q = GptqLinear.of(model.q, GROUP)
    plan = flashnorm.inspect(model, (rows(2, N),))
    assert [site.gain_state for site in plan.sites] == ["kept", "folded", "kept"]
    assert plan.sites[0].quantized == ("q.qweight",)


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(N, N), nn.LayerNorm(N), nn.Linear(N, N)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_quantized_writer_is_not_centered():
    model = Stream()
    assert flashnorm.inspect(model, (rows(2, N),), center=True).sites[0].centering == "folded"
    model.first = GptqLinear.of(model.first, GROUP)
    plan = flashnorm.inspect(model, (rows(2, N),), center=True)
    assert plan.sites[0].centering == "kept"
    assert "its writer first.qweight is quantized (GPTQ" in plan.sites[0].centering_reason
    assert plan.centerings == ()
    assert plan.sites[0].gain_state == "folded"


def test_a_norm_that_quantized_weights_were_made_behind_keeps_its_scale():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.RMSNorm(N, eps=1e-6), nn.Linear(N, N, bias=False)
            self.second, self.last = nn.RMSNorm(N, eps=1e-6), nn.Linear(N, N)

        def forward(self, x):
            return self.last(self.second(self.layer(self.first(x))))

    model = Twice()
    assert flashnorm.inspect(model, (rows(2, N),)).sites[0].scale == "cancelled"
    model.layer = GptqLinear.of(model.layer, GROUP)
    site = flashnorm.inspect(model, (rows(2, N),)).sites[0]
    assert site.scale == "kept"
    assert "is quantized" in site.scale_reason
    assert site.quantized == ("layer.qweight",)


def test_the_table_and_the_json_say_what_is_deferred_where():
    plan = flashnorm.inspect(ORIGINS["gptq"](toy()), (rows(2, N),))
    sites = plan.to_json()["sites"]
    assert [site["quantized"] for site in sites][2] == ["head.qweight"]
    assert "deferred into it by accelerate_" in str(plan)
    assert dataclasses.asdict(plan)["sites"][0]["quantized"]


class Tied(nn.Module):
    """A table of rows and a head over the same weight."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(N, N), nn.RMSNorm(N, eps=1e-5)
        self.head = nn.Linear(N, N, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.table(ids)))


def test_a_table_over_the_same_packed_weight_is_read_as_it_is():
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = Tied()
    ORIGINS["torchao intx"](model)
    model.table.weight = model.head.weight
    graph = record(model, (torch.arange(4)[None],))
    assert graph.packed == {"table.weight": layout.find(model.head).origin}
    assert find_fusible(graph).linears["head"].weight == "table.weight"
    assert named(model.head, "weight") is model.table.weight
    plan = make_plan(graph, untie=True)
    assert not plan.folded
    assert not plan.untied


class Rows(GptqLinear):
    """A table that is held like a layer, and is none."""

    def forward(self, ids):
        return self.dense().T[ids]


class Squared(GptqLinear):
    def forward(self, x):
        return super().forward(x).square()


def test_what_is_held_like_a_layer_and_computes_something_else_is_recorded_as_it_is():
    model = Tied()
    model.table, model.head = Rows.of(model.head, GROUP), Squared.of(model.head, GROUP)
    graph = record(model.eval(), (torch.arange(4)[None],))
    assert graph.packed == {}
    assert find_fusible(graph).linears == {}
    assert any(node.op in ("pow", "square") and node.path == "head" for node in graph.nodes)
