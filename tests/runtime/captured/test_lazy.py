"""What a captured step leaves out: kernels that nobody needs, and no value that anybody reads."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import flashnorm
from flashnorm.kernels import dispatch
from flashnorm.kernels.loaded import Loaded
from flashnorm.runtime import handoff, lazy
from flashnorm.runtime.forwards import FusedLinear
from tests.runtime.captured.stepping import (
    begun,
    captured,
    reasons,
    same_caches,
    step,
    wrapped,
)
from tests.runtime.models import NEOX, close

# What runs in a captured step.


def kernels(backend, model):
    """The kernels that are in the graph of a step."""
    cache = begun(model)
    step(model, cache)
    before = backend.captures.captures
    backend.calls.clear()
    with dispatch.forbid_fallback():
        step(model, cache)
    passes = backend.captures.captures - before
    count, rest = divmod(len(backend.calls), passes)
    assert not rest
    return backend.calls[-count:]


LAYER = [("rms", 32, 64, 32), ("none", 64, "residual"), ("rms", 160, 160), ("none", 64, "residual")]


def test_a_captured_layer_has_four_kernels_and_no_norm_alone(backend):
    """The head reads a part of the last norm's output, so that one is a kernel."""
    _, model = captured()
    named = [tuple(sorted(call[1:], key=str)) for call in LAYER]
    found = kernels(backend, model)
    assert [tuple(sorted(call[1:], key=str)) for call in found] == [*named, *named, ()]
    assert [call[0] for call in found] == [call[0] for call in (*LAYER, *LAYER)] + ["rms"]


def test_kernels_that_were_not_loaded_are_not_captured(backend):
    _, model = captured()
    cache = begun(model)
    step(model, cache)
    for product in vars(model)["forward"].products:
        product._loaded = Loaded()
    backend.calls.clear()
    step(model, cache)
    assert backend.calls
    assert not any("residual" in call for call in backend.calls)


def test_outside_of_steps_nothing_is_another_kernel_than_before(backend):
    """Bit for bit what `accelerate_` alone computes, with the same calls."""
    original, model = captured()
    plain = flashnorm.accelerate_(copy.deepcopy(original))
    step(model, begun(model)), step(plain, begun(plain))
    made = []
    for each in (model, plain):
        cache = begun(each)
        backend.calls.clear()
        first = step(each, cache)
        made.append((first, [c for c in backend.calls if "residual" not in c]))
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    layer = model.model.layers[0]
    assert type(vars(layer.self_attn.o_proj)["forward"]) is FusedLinear


def test_of_two_products_that_are_added_one_is(backend):
    """GPT-NeoX adds attention and MLP to each other, and then to the residual."""
    _, model = captured(NEOX)
    layer = [("layer", 192), ("layer", 160), ("none", 64, "residual")]
    assert kernels(backend, model) == [*layer, *layer, ("layer",)]


def reads_before(inner, x, kwargs):
    mean = x.mean(-1, keepdim=True)
    out, more = inner(hidden_states=x, **kwargs)
    return out + mean, more


def reads_after(inner, x, kwargs):
    out, more = inner(hidden_states=x, **kwargs)
    return out + x / 3, more


def writes_before(inner, x, kwargs):
    x.mul_(2)
    return inner(hidden_states=x, **kwargs)


def writes_a_view_before(inner, x, kwargs):
    x[..., :7].neg_()
    return inner(hidden_states=x, **kwargs)


def writes_data_before(inner, x, kwargs):
    x.data[..., 3:].add_(1)
    return inner(hidden_states=x, **kwargs)


def writes_after(inner, x, kwargs):
    out, more = inner(hidden_states=x, **kwargs)
    return out + x.mul_(2), more


def doubles_x_after(inner, x, kwargs):
    y = inner(x)
    x.mul_(2)
    return y


def doubles_x_behind_its_version(inner, x, kwargs):
    y = inner(x)
    x.data.mul_(2)
    return y


def moves_x(inner, x, kwargs):
    y = inner(x)
    other = torch.zeros_like(x)
    x.data = other
    return y


def changes_the_weight(inner, x, kwargs):
    y = inner(x)
    inner.weight.data.neg_()
    inner.weight.data.neg_()
    return y


def keeps_the_product(inner, x, kwargs):
    return inner(x) * 2


def reads_a_product_twice(inner, x, kwargs):
    y = inner(x)
    return (x[..., :1] + y) * y.sigmoid()


def adds_in_place(inner, x, kwargs):
    r = x.cumsum(-1)
    r += inner(x)
    return r


def subtracts(inner, x, kwargs):
    return torch.add(x, inner(x), alpha=-1)


def adds_a_row(inner, x, kwargs):
    return inner(x) + x[:, :, :1]


def adds_itself(inner, x, kwargs):
    y = inner(x)
    return y + y


def adds_another_dtype(inner, x, kwargs):
    return (inner(x) + x.double()).float()


def adds_a_turned_one(inner, x, kwargs):
    return inner(x) + torch.stack([x, x], -1)[..., 1]


ATTENTION = [
    reads_before,
    reads_after,
    writes_before,
    writes_a_view_before,
    writes_data_before,
    writes_after,
]
OUT = [
    doubles_x_after,
    doubles_x_behind_its_version,
    moves_x,
    changes_the_weight,
    keeps_the_product,
    reads_a_product_twice,
    adds_in_place,
    subtracts,
    adds_a_row,
    adds_itself,
    adds_another_dtype,
    adds_a_turned_one,
]


@pytest.mark.parametrize("act", [*ATTENTION, *OUT], ids=lambda act: act.__name__)
def test_whoever_reads_or_writes_what_was_left_out_has_the_models_own_values(twin, act):
    where = ("", "self_attn") if act in ATTENTION else ("self_attn", "o_proj")
    original = wrapped(*where, act)
    model = flashnorm.capture_(flashnorm.accelerate_(copy.deepcopy(original)))
    cache, own = begun(model), begun(original)
    for token in range(4):
        found, said = reasons(lambda token=token: step(model, cache, token))
        assert not said
        assert close(found, step(original, own, token)), token
        assert same_caches(cache, own)
    assert twin.replays == 3


def test_what_is_read_at_once_needs_no_second_pass(twin):
    """The head's product is, by whoever takes the logits."""
    _, model = captured()
    cache = begun(model)
    step(model, cache), step(model, cache)
    assert twin.captures == 1


# The tensor by itself.


class Place:
    """How far a capture is, which here moves when a test says so."""

    def __init__(self):
        self.at = 0

    def __call__(self):
        return self.at


def left(value, place=None, add=None, reads=()):
    """(a lazy tensor, its pass, how often it was computed)."""
    computed = []

    def compute():
        computed.append(1)
        return value.clone()

    owner = lazy.Pass(place or Place())
    with torch.no_grad():
        made = owner.leave((value.shape, value.dtype, value.device), reads, compute, add)
    return made, owner, computed


VALUE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_what_needs_no_values_computes_none():
    z, _, computed = left(VALUE)
    assert z.shape == VALUE.shape
    assert z.stride() == VALUE.stride()
    assert z.dtype == VALUE.dtype
    assert z.device == VALUE.device
    assert z.is_contiguous()
    assert z.contiguous() is z
    assert z.to(torch.float32) is z
    assert torch.nn.functional.dropout(z, 0.5, training=False) is z
    assert (z.dim(), z.numel(), len(z), z.nbytes) == (3, 24, 2, 96)
    assert "computed=False" in repr(z)
    assert not computed


READS = {
    "an operation": lambda z: z + 1,
    "the second argument": lambda z: torch.ones(2, 3, 4) - z,
    "a list": lambda z: torch.cat([z, z]),
    "a keyword": lambda z: torch.mul(input=torch.ones(2, 3, 4), other=z),
    "a view": lambda z: z.view(6, 4),
    "an index": lambda z: z[1],
    "a matrix product": lambda z: z @ torch.ones(4, 2),
    "a clone": lambda z: z.clone(),
    "another dtype": lambda z: z.double(),
    "data": lambda z: z.data,
    "detached": lambda z: z.detach(),
    "numpy": lambda z: torch.from_numpy(z.numpy().copy()),
    "an array": lambda z: torch.from_numpy(np.asarray(z).copy()),
    "a list of numbers": lambda z: torch.tensor(z.tolist()),
    "dlpack": lambda z: torch.from_dlpack(z).clone(),
    "a deep copy": copy.deepcopy,
    "a pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "shared memory": lambda z: z.share_memory_(),
    "a storage": lambda z: torch.tensor(list(z.untyped_storage())).to(torch.uint8),
    "written over": lambda z: torch.zeros(2, 3, 4).copy_(z),
    "out": lambda z: torch.add(z, 1, out=torch.zeros(2, 3, 4)),
    "a number": lambda z: z[0, 0, 0].item(),
}


@pytest.mark.parametrize("read", READS)
@torch.no_grad()
def test_whoever_reads_has_the_values(read):
    z, owner, computed = left(VALUE)
    found, expected = READS[read](z), READS[read](VALUE.clone())
    assert type(found) is type(expected)
    assert found == expected if isinstance(found, float) else torch.equal(found, expected)
    assert torch.equal(z + 0, VALUE)
    assert len(computed) == 1
    assert not owner.late


def test_its_address_is_that_of_its_values():
    z, _, _ = left(VALUE)
    address = z.data_ptr()
    assert address == z.detach().data_ptr() != 0
    assert z.written


WRITES = {
    "in place": (lambda z: z.mul_(2), 2 * VALUE),
    "a view": (lambda z: z.view(-1).mul_(2), 2 * VALUE),
    "an index": (lambda z: z.__setitem__((0, 0), 5.0), None),
    "out": (lambda z: torch.mul(VALUE, 2, out=z), 2 * VALUE),
    "data": (lambda z: z.data.mul_(2), 2 * VALUE),
    "other data": (lambda z: setattr(z, "data", 2 * VALUE), 2 * VALUE),
    "set": (lambda z: z.set_(2 * VALUE), 2 * VALUE),
    "an array": (lambda z: np.multiply(z.numpy(), 2, out=z.numpy()), 2 * VALUE),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_whoever_writes_voids_what_was_computed_with_it(write):
    act, expected = WRITES[write]
    for read_before in (False, True):
        z, _, computed = left(VALUE)
        reader = object()
        handoff.leave(z, {reader: torch.ones(1)}, captured=True)
        if read_before:
            assert torch.equal(z * 1, VALUE)
            assert not z.written
        act(z)
        assert z._flashnorm.take(z, reader) is None
        if expected is not None:
            assert torch.equal(z + 0, expected)
        assert len(computed) == 1


@torch.no_grad()
def test_what_writes_in_place_returns_the_same_tensor():
    z, _, _ = left(VALUE)
    assert z.mul_(2) is z


@pytest.mark.parametrize(
    "act",
    [
        lambda z: z.unsqueeze_(0),
        lambda z: z.transpose_(0, 1),
        lambda z: z.resize_(5),
        lambda z: z.set_(torch.ones(7)),
        lambda z: setattr(z, "data", torch.ones(7)),
    ],
)
@torch.no_grad()
def test_another_shape_in_place_is_an_error(act):
    z, _, _ = left(VALUE)
    with pytest.raises(flashnorm.FlashNormError, match="cannot be given another shape"):
        act(z)


@torch.no_grad()
def test_results_are_for_the_very_tensor_and_taken_once():
    z, _, _ = left(VALUE)
    reader, ready = object(), torch.ones(1)
    handoff.leave(z, {reader: ready}, captured=True)
    other, _, _ = left(VALUE)
    assert z._flashnorm.take(other, reader) is None
    assert z._flashnorm.take(z, reader) is ready
    assert z._flashnorm.take(z, reader) is None


@torch.no_grad()
def test_a_product_is_added_in_one_where_nothing_came_in_between():
    residual, place, added = torch.ones(2, 3, 4), Place(), []

    def add(r):
        added.append(r)
        return VALUE + r

    for act in (lambda y, r: y + r, lambda y, r: r + y, lambda y, r: torch.add(r, y, alpha=1)):
        y, owner, computed = left(VALUE, place, add)
        assert torch.equal(act(y, residual), VALUE + 1)
        assert added.pop() is residual
        assert not added
        assert not computed
        assert not owner.late


NOT_ADDED = {
    "alpha": lambda y: torch.add(torch.ones(2, 3, 4), y, alpha=2),
    "a number": lambda y: y + 1,
    "a row": lambda y: y + torch.ones(4),
    "another dtype": lambda y: y + torch.ones(2, 3, 4).double(),
    "in place": lambda y: torch.ones(2, 3, 4).add_(y),
    "out": lambda y: torch.add(torch.ones(2, 3, 4), y, out=torch.zeros(2, 3, 4)),
    "strided": lambda y: y + torch.ones(4, 3, 2).transpose(0, 2),
    "subtracted": lambda y: torch.ones(2, 3, 4) - y,
}


@pytest.mark.parametrize("act", NOT_ADDED)
@torch.no_grad()
def test_other_sums_are_computed_from_the_product(act):
    y, owner, _ = left(VALUE, add=lambda r: r / 0)
    assert torch.equal(NOT_ADDED[act](y), NOT_ADDED[act](VALUE))
    assert not owner.late


@torch.no_grad()
def test_a_read_further_on_is_too_late_and_said():
    place, x = Place(), torch.ones(3)
    for move in (lambda: setattr(place, "at", place.at + 1), lambda: setattr(x, "data", x.clone())):
        y, owner, _ = left(VALUE, place, add=lambda r: r / 0, reads=[x])
        move()
        assert torch.equal(y + torch.ones(2, 3, 4), VALUE + 1)
        assert owner.late == {0}
        again = lazy.Pass(place, frozenset({0}))
        found = again.leave((VALUE.shape, VALUE.dtype, VALUE.device), [x], VALUE.clone)
        assert type(found) is torch.Tensor


@torch.no_grad()
def test_what_is_left_at_the_end_is_too_late_or_gone():
    owner = lazy.Pass(Place())
    like = (VALUE.shape, VALUE.dtype, VALUE.device)
    with lazy.within(owner):
        kept, read = owner.leave(like, [], VALUE.clone), owner.leave(like, [], VALUE.clone)
        owner.leave(like, [], VALUE.clone)
        read.add(1)
    assert lazy.current() is None
    assert owner.late == {0}
    assert torch.equal(read + 0, VALUE)
    with pytest.raises(flashnorm.FlashNormError, match="read after the capture had ended"):
        kept.add(1)
