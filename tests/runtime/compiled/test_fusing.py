"""Graphs before and after they are edited: the same values, and our calls where they may be.

In float64, where one rounding more or less is far below what a wrong edit would do.
"""

import operator
import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm.kernels.backend import CompiledPolicy
from flashnorm.kernels.gpu import policy as gpu
from flashnorm.runtime import fusing

# In float64 an edit changes the order of sums alone. Each of up to 14 steps rounds sums of N
# products and a residual by (N + 2) · 2⁻⁵³ of what is summed, 1.6e-14 in all; terms that cancel are
# up to some tens of times their sum or one. A wrong operand, or one written meanwhile, is off by
# about one.
N, OURS = 8, torch.ops.flashnorm.norm_linear.default
ORDER = 14 * (N + 2) * 2.0**-53 * 64


def products(x, *weights, norm="none", activation=None, residual=None, biases=None, gain=None):
    biases = [None] * len(weights) if biases is None else biases
    rest = (norm, 1e-6, gain, 0.0, None, None, activation, residual, None)
    return OURS(x, list(weights), biases, *rest)


def product(x, *weights, **options):
    return products(x, *weights, **options)[0]


def inputs(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def edited(program, *tensors):
    """(the graph after the edit, how many operations that saved); its results are the same."""
    module = make_fx(program, tracing_mode="fake")(*tensors)
    copies = [[t.clone() for t in tensors] for _ in range(2)]
    expected = module(*copies[0])
    for node in reversed(module.graph.nodes):  # as a compiler does before it asks us
        if node.target is operator.getitem and not node.users:
            module.graph.erase_node(node)
    saved = fusing.fuse_(module.graph)
    module.graph.lint()
    module.recompile()
    found = module(*copies[1])
    for a, b in zip((*found, *copies[1]), (*expected, *copies[0]), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=ORDER, atol=ORDER)
    return module.graph, saved


def ours(graph):
    return [node for node in graph.nodes if node.target is OURS]


def residuals(graph):
    return [node.args[fusing.RESIDUAL] is not None for node in ours(graph)]


SQUARE = [(3, N), (N, N), (N, N), (3, N)]  # x, two weights, r


@pytest.mark.parametrize(
    "program",
    [
        lambda x, w, v, r: [product(x, w) + r],
        lambda x, w, v, r: [r + product(x, w)],
        lambda x, w, v, r: [torch.add(r, product(x, w), alpha=1)],
        lambda x, w, v, r: [product(x, w, norm="rms", gain=w[0]) + r],
        lambda x, w, v, r: [product(x, w, v, norm="rms", activation="silu") + r],
        lambda x, w, v, r: [product(x, w, biases=[v[0]]) + x],
        lambda x, w, v, r: [r * 2, product(x, w) + r.exp()],  # made before
        lambda x, w, v, r: [torch.ops.aten.add(product(x, w), x.sin() + r)],
    ],
)
def test_a_sum_becomes_the_residual_of_the_product(program):
    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 1
    assert residuals(graph) == [True]


def late(x, w, v, r):
    """What is added is made after the product."""
    y = product(x, w)
    return [y + (r.exp() @ v)]


def test_a_residual_that_is_made_later_waits_for_no_one():
    graph, saved = edited(late, *inputs(*SQUARE))
    assert saved == 1
    assert residuals(graph) == [True]


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        (lambda x, w, v, r: [(product(x, w) + product(r, v)) + x], [True, True]),
        (lambda x, w, v, r: [x + (product(x, w) + product(r, v))], [True, True]),
        (lambda x, w, v, r: [(x + product(x, w)) + product(r, v)], [True, True]),
        (lambda x, w, v, r: [product(x, w) + product(r, v)], [False, True]),
        (lambda x, w, v, r: [(product(x, w) + x) + r.exp()], [True]),
        (lambda x, w, v, r: [product(x + product(x, w), v) + x], [True, True]),
    ],
)
def test_of_several_products_as_many_as_can_take_up_the_sum(program, calls):
    graph, saved = edited(program, *inputs(*SQUARE))
    assert residuals(graph) == calls
    assert saved == sum(calls)


def test_layers_one_behind_the_other():
    def program(x, w, v, r):
        for _ in range(3):
            x = x + product(product(x, w, norm="rms"), v)
            x = product(product(x, w, v, norm="rms", activation="gelu"), w) + x
        return [x]

    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 6
    assert residuals(graph) == [False, True] * 6
    assert not any(node.target is fusing.ADD for node in graph.nodes)


def used_twice(x, w, v, r):
    y = product(x, w)
    return [y + r, y]


def added_to_itself(x, w, v, r):
    y = product(x, w)
    return [y + y]


def inner_sum_used_twice(x, w, v, r):
    y = x + r.exp()
    z = y + r
    return [product(x, w) * 1, z, z + y]


def in_place(x, w, v, r):
    y = product(x, w)
    y.add_(r)
    return [y]


def x_is_written(x, w, v, r):
    x = x * 1
    y = product(x, w)
    x.mul_(2)
    return [y + r, x]


def residual_is_written(x, w, v, r):
    r = r * 1
    y = product(x, w)
    r.copy_(x)
    return [y + r]


def weight_is_written(x, w, v, r):
    y = product(x, w)
    w.index_put_([torch.tensor([0])], v[:1])
    return [y + r]


def a_view_is_written(x, w, v, r):
    y = product(x, w)
    x[:1].zero_()
    return [y + r]


def another_tensor_is_written(x, w, v, r):
    y = product(x, w)
    v.add_(1)  # which may be a view of any other, as far as a graph says
    return [y + r]


def another_factor(x, w, v, r):
    return [torch.add(product(x, w), r, alpha=2), torch.add(x, product(r, v), alpha=0.5)]


def several_results(x, w, v, r):
    y, z = products(x, w, v)
    return [y + r, z]


def one_result_of_two(x, w, v, r):
    return [products(x, w, v)[0] + r]


def there_is_a_residual(x, w, v, r):
    return [product(x, w, residual=r) + x.exp()]


def a_number(x, w, v, r):
    return [product(x, w) + 1]


def a_row(x, w, v, r):
    return [product(x, w) + r[0]]


def expanded(x, w, v, r):
    return [product(x, w) + r[:1].expand(3, N)]


def turned(x, w, v, r):
    return [product(w, v) + v.T]


def wider(x, w, v, r):
    return [product(x[:1], w) + r]


def another_dtype(x, w, v, r):
    return [product(x, w) + r.float(), product(x.float(), v.float()) + r]


def cast(x, w, v, r):
    return [product(x, w).float() + r.float()]


def dropped(x, w, v, r):
    torch.manual_seed(0)
    return [torch.nn.functional.dropout(product(x, w), 0.5) * 0 + r]


@pytest.mark.parametrize(
    "program",
    [
        used_twice,
        added_to_itself,
        inner_sum_used_twice,
        in_place,
        x_is_written,
        residual_is_written,
        weight_is_written,
        a_view_is_written,
        another_tensor_is_written,
        another_factor,
        several_results,
        one_result_of_two,
        there_is_a_residual,
        a_number,
        a_row,
        expanded,
        turned,
        wider,
        another_dtype,
        cast,
        dropped,
    ],
)
def test_what_is_no_sum_of_a_product_and_one_more_is_let_be(program):
    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 0
    assert len(residuals(graph)) == sum(node.target is OURS for node in graph.nodes) > 0


def test_what_is_written_elsewhere_moves_nothing():
    def program(x, w, v, r):
        r = r * 1
        r.add_(1)  # before the product
        y = product(x, w) + r
        x.mul_(2)  # after the sum
        return [y]

    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 1
    assert residuals(graph) == [True]


def test_no_call_moves_past_a_region_or_a_module():
    """What they write to is not said."""
    module = make_fx(lambda x, w, v, r: [product(x, w) + r], tracing_mode="fake")(*inputs(*SQUARE))
    add = next(node for node in module.graph.nodes if node.target is fusing.ADD)
    with module.graph.inserting_before(add):
        between = module.graph.call_function(print, ())
    assert fusing.fuse_(module.graph) == 0
    module.graph.erase_node(between)
    assert fusing.fuse_(module.graph) == 1


def test_sizes_that_are_not_known_are_let_be():
    def program(x, w, v, r):
        return [product(x, w) + r]

    module = make_fx(program, tracing_mode="symbolic")(*inputs(*SQUARE))
    assert fusing.fuse_(module.graph) == 0


def test_a_backend_that_does_not_want_it_keeps_its_graphs(backend):
    object.__setattr__(backend, "compiled", CompiledPolicy(alone=True, precompute=False))
    assert edited(lambda x, w, v, r: [product(x, w) + r], *inputs(*SQUARE))[1] == 0


def test_calls_with_one_x_join():
    def program(x, w, v, r):
        a = product(x, w, biases=[v[0]])
        b = product(x, v[:4])
        c = product(x, w[2:])
        return [a * 2, torch.cat([b, c], 1)]

    graph, saved = edited(program, *inputs(*SQUARE))
    (call,) = ours(graph)
    assert saved == 2
    assert [node is None for node in call.args[fusing.BIASES]] == [False, True, True]


def test_calls_with_one_norm_join():
    def program(x, w, v, r):
        a, b = products(x, w, v, norm="rms", gain=r[0])
        c = product(x, w[2:], norm="rms", gain=r[0])
        other = product(x, w, norm="layer", gain=r[0])
        return [a, b, c, other]

    def shared(x, w, v, r):
        g = r[0]
        a, b = products(x, w, v, norm="rms", gain=g)
        return [a, b, product(x, w[2:], norm="rms", gain=g), product(x, w, norm="layer", gain=g)]

    assert edited(program, *inputs(*SQUARE))[1] == 0  # views of one row, as far as is known three
    graph, saved = edited(shared, *inputs(*SQUARE))
    assert saved == 1
    assert len(ours(graph)) == 2


def depends(x, w, v, r):
    """The second one's weight is made of the first one's result."""
    a = product(x, w)
    return [a, product(x, a.T @ a)]


def written_between(x, w, v, r):
    a = product(x, w)
    x.mul_(2)
    return [a, product(x, v)]


def read_first(x, w, v, r):
    """The second one's bias is made after the first one's result is read."""
    a = product(x, w)
    b = a.sin()
    return [b, product(x, v, biases=[v[0].exp()])]


def with_activation(x, w, v, r):
    return [product(x, w, v, activation="relu"), product(x, v, w, activation="relu")]


def with_a_residual(x, w, v, r):
    return [product(x, w, residual=r), product(x, v, residual=r)]


STAY = [depends, written_between, read_first, with_activation, with_a_residual]


@pytest.mark.parametrize("program", STAY)
def test_calls_that_cannot_be_one_stay(program):
    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 0
    assert len(ours(graph)) == 2


def test_a_call_has_no_more_weights_than_the_backend_takes():
    def program(x, *weights):
        return [product(x, w) * 1 for w in weights]

    # All results are read at the end, or there is nothing to join.
    def late(x, *weights):
        made = [product(x, w) for w in weights]
        return [y * 1 for y in made]

    graph, saved = edited(late, *inputs((3, N), *[(N, N)] * 11))
    assert [len(call.args[fusing.WEIGHTS]) for call in ours(graph)] == [gpu.LIMITS.weights, 3]
    assert saved == 9
    graph, saved = edited(program, *inputs((3, N), *[(N, N)] * 3))
    assert saved == 2  # weights are there before all


def test_a_group_whose_result_another_group_reads():
    def program(x, w, v, r):
        a, b = product(x, w), product(x, v)
        return [product(a, w), product(a, v), b * 1]

    graph, saved = edited(program, *inputs(*SQUARE))
    assert saved == 2
    assert len(ours(graph)) == 2


def test_the_strides_that_inductor_asks_for_are_of_as_many_arguments(monkeypatch):
    module = make_fx(late, tracing_mode="fake")(*inputs(*SQUARE))
    (call,) = ours(module.graph)
    call.meta[fusing.STRIDES] = (tuple(call.args), {})
    assert fusing.fuse_(module.graph) == 1
    (call,) = ours(module.graph)
    values, _ = call.meta[fusing.STRIDES]
    assert values[fusing.RESIDUAL] is call.args[fusing.RESIDUAL].meta["val"]
    assert values[0] is call.args[0].meta["val"]


class Draft:
    """A random program of products, sums and writes over some tensors of one shape."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.steps = [self.step() for _ in range(self.random.randint(4, 14))]

    def step(self):
        often, rare = ["product", "add"], ["join", "exp", "write", "used", "residual", "gated"]
        return self.random.choice([*often * 3, *rare]), [self.random.random() for _ in range(4)]

    def __call__(self, x, w, v, r):
        tensors, weights = [x, r], [w, v]
        for kind, numbers in self.steps:
            a, b = (tensors[int(number * len(tensors))] for number in numbers[:2])
            weight, other = (weights[int(number * 2)] for number in numbers[2:])
            if kind == "write":
                a.mul_(0.5)
            elif kind == "join":
                tensors += [product(a, weight), product(a, other)]
            elif kind == "gated":
                tensors.append(product(a, weight, other, activation="silu"))
            else:
                tensors.append(
                    {
                        "product": lambda: product(a, weight, norm="rms"),  # noqa: B023
                        "residual": lambda: product(a, weight, residual=b),  # noqa: B023
                        "used": lambda: product(a, weight) + b,  # noqa: B023
                        "exp": lambda: a.tanh(),  # noqa: B023
                        "add": lambda: a + b,  # noqa: B023
                    }[kind]()
                )
        return tensors[-3:]


def test_random_programs_have_the_same_values():
    saved = [edited(Draft(seed), *inputs(*SQUARE, seed=seed))[1] for seed in range(150)]
    assert sum(map(bool, saved)) > 50


def test_only_a_call_of_ours_starts_anything():
    module = make_fx(lambda x, w, v, r: [x @ w + r], tracing_mode="fake")(*inputs(*SQUARE))
    assert fusing.fuse_(module.graph) == 0
    assert not any(node.target is operator.getitem for node in module.graph.nodes)
