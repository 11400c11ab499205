"""Compiled graphs of the GPU's policy, on a backend in numpy: what the pass does, and when."""

import copy
import logging

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx, config
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers import Olmo2Config

import flashnorm
from flashnorm.functional import norm_linear
from flashnorm.kernels.cpu.backend import CPU
from flashnorm.runtime import fusing, inductor
from tests.kernels.bounds import assert_close
from tests.runtime.compiled.test_fusing import ORDER, OURS, N, inputs, product, residuals
from tests.runtime.models import LLAMA, NEOX, QWEN3, SIZES, close, dyt, ids, logits, tiny

OLMO2 = Olmo2Config(**SIZES, num_key_value_heads=2, pad_token_id=0)  # norms behind sublayers
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX, "olmo2": OLMO2}
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    """No pass is there before, none stays, and nothing that others compiled is taken."""
    caches = dict.fromkeys(("fx_graph_cache", "fx_graph_remote_cache"), False)
    kept = torch._functorch.config.patch(enable_autograd_cache=False)
    with config.patch(post_grad_custom_post_pass=None, **caches), kept:
        yield


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by what was saved in every graph, and by the graph."""
    found = []

    def noted(graph, run=fusing.fuse_):
        found.append((run(graph), graph))
        return found[-1][0]

    monkeypatch.setattr(fusing, "fuse_", noted)
    return found


def original(name):
    return dyt(HALF) if name == "dyt" else tiny(CONFIGS[name], HALF)


def pair(name):
    model = original(name)
    return model, flashnorm.accelerate_(copy.deepcopy(model))


def edited(model):
    """The model compiled by all of Inductor's passes, to graphs that are run as they are."""

    def inner(module, inputs, **options):
        compile_fx._recursive_post_grad_passes(module, is_inference=options["is_inference"])
        module.recompile()
        return make_boxed_func(module.forward)

    def backend(module, inputs):
        return compile_fx.compile_fx(module, inputs, inner_compile=inner)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False)


# Of two layers: the sums that products take up; where norms are behind the sublayers, the three
# calls of q, k and v that become one.
SAVED = {"llama": 4, "qwen3": 4, "gpt_neox": 4, "dyt": 4, "olmo2": 4}


@pytest.mark.parametrize("name", SAVED)
def test_sums_are_in_the_products_and_values_stay(graphs, name):
    model, ours = pair(name)
    assert close(logits(edited(ours), ids(2, 1)), logits(model, ids(2, 1)), HALF)
    ((saved, graph),) = graphs
    assert saved == SAVED[name]
    assert len(residuals(graph)) == 2 * 4 + 1  # qkv, o, gate and up, down; and the head


def test_of_dynamic_tanh_the_last_is_left_whose_part_the_head_reads(graphs):
    model, ours = pair("dyt")
    compiled = edited(ours)
    for change in ("nothing", "in place", "another", "no axis"):
        for each in (model, ours):
            norm = each.model.layers[0].input_layernorm
            if change == "in place":
                norm.alpha.data.mul_(2)
            elif change != "nothing":
                shape = (1,) if change == "another" else ()
                norm.alpha = torch.nn.Parameter(torch.full(shape, 0.7, dtype=HALF))
        assert close(logits(compiled, ids(2, 1)), logits(model, ids(2, 1)), HALF), change
        _, graph = graphs[-1]
        assert [node.op for node in graph.nodes if "tanh" in str(node.target)] == ["call_function"]


@pytest.mark.parametrize("name", ["alpha", "weight", "bias"])
@pytest.mark.parametrize("shape", [(64,), (1,), (1, 1, 1)], ids=str)
def test_parameters_of_a_dynamic_tanh_that_get_another_shape(graphs, name, shape):
    model, ours = pair("dyt")
    compiled = edited(ours)
    logits(compiled, ids(2, 1))
    torch.manual_seed(1)
    values = torch.randn(shape, dtype=HALF)
    for each in (model, ours):
        setattr(each.model.layers[0].input_layernorm, name, torch.nn.Parameter(values))
    assert close(logits(compiled, ids(2, 1)), logits(model, ids(2, 1)), HALF)
    assert close(logits(ours, ids(2, 1)), logits(model, ids(2, 1)), HALF)


def test_many_rows_are_the_library_s(graphs):
    model, ours = pair("llama")
    tokens = ids(1, 17)
    assert close(logits(edited(ours), tokens), logits(model, tokens), HALF)
    assert graphs == []
    assert config.post_grad_custom_post_pass is None


def test_two_models_in_one_graph(graphs):
    (one, ours), (other, others) = pair("llama"), pair("gpt_neox")

    def both(tokens, use_cache):
        a = ours(tokens, use_cache=use_cache).logits
        return torch.stack([a, others(tokens, use_cache=use_cache).logits])

    with torch.no_grad():
        found = edited(both)(ids(1, 1), use_cache=False)
    for each, expected in zip(found, (one, other), strict=True):
        assert close(each, logits(expected, ids(1, 1)), HALF)
    assert graphs[0][0] == SAVED["llama"] + SAVED["gpt_neox"]


def test_a_model_that_is_compiled_with_options_has_its_sums_in_products(graphs, backend):
    model, ours = pair("llama")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=False, options={"shape_padding": False})
    assert close(logits(compiled, ids(1, 1)), logits(model, ids(1, 1)), HALF)
    assert [saved for saved, _ in graphs] == [SAVED["llama"]]


def test_a_cpu_s_graphs_are_let_be():
    assert not CPU.compiled.fuses


def summed(x, w, r):
    return product(x, w) + r


SHAPES = ((3, N), (N, N), (3, N))


def run(function=summed, tensors=None, **options):
    """The function's result by Inductor, without a kernel of the compiler's own to build."""
    torch._dynamo.reset()
    tensors = inputs(*SHAPES) if tensors is None else tensors
    found = torch.compile(function, fullgraph=True, dynamic=False, **options)(*tensors)
    torch.testing.assert_close(found, function(*tensors), rtol=ORDER, atol=ORDER)
    return found


class Noting(CustomGraphPass):
    """Another's pass, that notes whether sums are there."""

    def __init__(self, uuid="noting"):
        self.name, self.sums = uuid, []

    def __call__(self, graph):
        self.sums.append(any(node.target is fusing.ADD for node in graph.nodes))

    def uuid(self):
        return self.name


def test_what_is_installed_runs_and_is_installed_once(graphs):
    run()
    assert graphs == []
    inductor.install()
    there = config.post_grad_custom_post_pass
    inductor.install()
    assert config.post_grad_custom_post_pass is there
    run()
    assert [saved for saved, _ in graphs] == [1]
    assert there.uuid() == inductor.FuseNorms().uuid()


def test_a_pass_that_is_there_runs_first(graphs):
    theirs = config.post_grad_custom_post_pass = Noting()
    inductor.install()
    run()
    assert theirs.sums == [True]
    assert [saved for saved, _ in graphs] == [1]
    both = config.post_grad_custom_post_pass.uuid()
    assert "noting" in both
    assert both != inductor.FuseNorms(Noting("other")).uuid()
    # What is compiled with a pass that cannot be known again is not kept.
    assert inductor.FuseNorms(Noting(None)).uuid() is None
    assert inductor.FuseNorms(print).uuid() is None


def test_passes_in_a_list_stay_in_one(graphs):
    if not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("this torch takes one pass")
    theirs = Noting()
    config.post_grad_custom_post_pass = [theirs]
    inductor.install()
    inductor.install()
    assert len(config.post_grad_custom_post_pass) == 2
    run()
    assert theirs.sums == [True]
    assert [saved for saved, _ in graphs] == [1]


def test_a_pass_that_is_told_of_gradients_still_is(graphs):
    aware = getattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    if aware is None:
        pytest.skip("this torch tells no pass")

    told = []

    class Told(aware):
        def __call__(self, graph, is_inference):
            told.append(is_inference)

        def uuid(self):
            return "told"

    config.post_grad_custom_post_pass = Told()
    inductor.install()
    run()
    assert told == [True]
    assert [saved for saved, _ in graphs] == [1]


def test_who_gives_a_pass_as_an_option_has_that_one(graphs):
    theirs = Noting()
    inductor.install()
    run(options={"post_grad_custom_post_pass": theirs})
    assert theirs.sums == [True]
    assert graphs == []
    run()
    assert [saved for saved, _ in graphs] == [1]


def test_an_error_of_ours_breaks_nothing(monkeypatch, caplog):
    def broken(graph):
        raise KeyError("gone")

    monkeypatch.setattr(fusing, "Order", broken)
    inductor.install()
    with caplog.at_level(logging.WARNING, inductor.__name__):
        run()
    assert "adds its residuals by themselves" in caplog.text


def trained(x, w, r):
    return norm_linear(x, w, residual=None) + r


def test_a_graph_with_a_gradient_is_let_be(graphs):
    inductor.install()
    tensors = [t.float().requires_grad_() for t in inputs(*SHAPES)]
    expected = torch.autograd.grad(trained(*tensors).square().sum(), tensors)
    torch._dynamo.reset()
    found = torch.compile(trained, fullgraph=True)(*tensors)
    for a, b in zip(torch.autograd.grad(found.square().sum(), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert graphs == []
    with torch.no_grad():
        torch.compile(trained, fullgraph=True)(*tensors)
    assert [saved for saved, _ in graphs] == [1]


def test_a_region_inside_is_a_graph_of_its_own(graphs):
    def branched(x, w, r):
        return torch.cond(x.sum() > 0, lambda: product(x, w) + r, lambda: product(x, w) * 1)

    inductor.install()
    run(branched)
    assert sorted(saved for saved, _ in graphs) == [0, 1]  # of those with a call of ours


def test_a_sum_in_the_product_is_rounded_once(backend):
    """Half precision: within the bound of the operator with a residual, which has one rounding."""
    from flashnorm.kernels import norms
    from flashnorm.kernels.call import Call

    x, w, r = (t * 8 for t in inputs(*SHAPES, dtype=HALF))
    inductor.install()
    torch._dynamo.reset()
    found = torch.compile(summed, fullgraph=True, dynamic=False)(x, w, r)
    assert_close(Call(x, (w,), None, norms.NONE, 1e-6, output_residual=r), [found])
    assert OURS is torch.ops.flashnorm.norm_linear.default
