"""Counters of a graph that are raised together: the same values, with fewer operations."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from flashnorm.runtime.counting import ADD, ALL, COPY, count_

VIEW, WRITE = torch.ops.aten.view.default, torch.ops.aten.mul_.Tensor


class Written:
    """A graph of counters (and one tensor x) that are raised at its end, and what reads them."""

    def __init__(self, count, dtype=torch.int64, shape=()):
        self.graph, self.dtype, self.shape = Graph(), dtype, shape
        self.counters = [self.placeholder(f"n{i}") for i in range(count)]
        self.results = []

    def placeholder(self, name):
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return node

    def call(self, target, *args):
        return self.graph.call_function(target, args)

    def raised(self, counter, by=1):
        return self.call(ADD, counter, by)

    def write(self, counter, value):
        return self.call(COPY, counter, value)

    def read(self, *nodes):
        self.results += nodes

    def done(self):
        self.graph.output(tuple(self.results))
        return self.graph


def run(graph, count, dtype=torch.int64, shape=()):
    """(what it returns, its counters afterwards)."""
    held = [torch.full(shape, 3 + 5 * i, dtype=dtype) for i in range(count)]
    found = GraphModule(torch.nn.Module(), graph)(*held)
    return [t.clone() for t in found], held


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def check(make, saved, count=3, **kind):
    """The graph that `make` writes does the same afterwards; so many operations were saved."""
    expected = run(make().done(), count, **kind)
    graph = make().done()
    assert count_(graph) == saved
    graph.lint()
    found = run(graph, count, **kind)
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)
    return graph


def three(by=(1, 1, 1), dtype=torch.int64, shape=()):
    """Positions are read off each, as a cache does; then all are written."""
    made = Written(3, dtype, shape)
    sums = []
    for counter, each in zip(made.counters, by, strict=True):
        made.read(made.call(ADD, counter, 7))
        sums.append(made.raised(counter, each))
    for counter, value in zip(made.counters, sums, strict=True):
        made.write(counter, value)
    return made


def test_three_are_one():
    graph = check(three, 2)
    assert targets(graph) == [ADD] * 3 + [ALL]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_of_any_integers(dtype, shape):
    check(lambda: three(dtype=dtype, shape=shape), 2, dtype=dtype, shape=shape)


def test_those_that_go_up_alike_are():
    graph = check(lambda: three((1, 2, 1)), 1)
    assert targets(graph).count(ALL) == 1
    assert targets(graph).count(COPY) == 1
    check(lambda: three((1, 2, 3)), 0)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, ()), (torch.int64, (2,))])
def test_what_is_no_counter_is_left(dtype, shape):
    check(lambda: three(dtype=dtype, shape=shape), 0, dtype=dtype, shape=shape)


def test_one_that_somebody_reads_after_it_was_raised():
    def make():
        made = Written(3)
        sums = [made.raised(counter) for counter in made.counters]
        made.read(made.call(ADD, sums[0], 10))  # of the sum, not of the counter
        for counter, value in zip(made.counters, sums, strict=True):
            made.write(counter, value)
        return made

    check(make, 1)


def test_one_that_is_read_between_the_writes():
    def make():
        made = Written(3)
        sums = [made.raised(counter) for counter in made.counters]
        made.write(made.counters[0], sums[0])
        made.read(made.call(ADD, made.counters[2], 4))
        made.write(made.counters[1], sums[1])
        made.write(made.counters[2], sums[2])
        return made

    check(make, 1)


def test_one_whose_view_is_read_late_or_written():
    def late():
        made = Written(3)
        view = made.call(VIEW, made.counters[0], [1])
        sums = [made.raised(counter) for counter in made.counters]
        for counter, value in zip(made.counters, sums, strict=True):
            made.write(counter, value)
        made.read(made.call(ADD, view, 2))
        return made

    def written():
        made = Written(3)
        sums = [made.raised(counter) for counter in made.counters]
        made.call(WRITE, made.call(VIEW, made.counters[1], [1]), 3)
        for counter, value in zip(made.counters, sums, strict=True):
            made.write(counter, value)
        return made

    check(late, 1)
    check(written, 1)


def test_one_that_is_given_to_something_unknown():
    def make():
        made = Written(3)
        sums = [made.raised(counter) for counter in made.counters]
        made.read(made.call(operator.add, made.counters[1], 1))
        for counter, value in zip(made.counters, sums, strict=True):
            made.write(counter, value)
        return made

    check(make, 1)


def test_one_that_is_written_with_another_or_returned():
    def crossed():
        made = Written(3)
        a, b, c = made.counters
        sums = [made.raised(a), made.raised(b), made.raised(c)]
        made.write(a, sums[1])
        made.write(b, sums[0])
        made.write(c, sums[2])
        return made

    def returned():
        made = Written(3)
        sums = [made.raised(counter) for counter in made.counters]
        written = [
            made.write(counter, value) for counter, value in zip(made.counters, sums, strict=True)
        ]
        made.read(written[1])
        return made

    check(crossed, 0)
    check(returned, 1)


def test_a_graph_without_any():
    check(lambda: Written(1), 0, count=1)
