"""Gated pairs of many rows in compiled graphs: no pass for the norm, and no larger error."""

import copy

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.kernels import norms, reference
from flashnorm.kernels.call import ACTIVATIONS, Call
from flashnorm.runtime import deferred
from tests.kernels.bounds import assert_close
from tests.runtime.models import LLAMA, close, ids, logits, tiny
from tests.runtime.test_capture import graph_of

HALF = torch.bfloat16


def weightless(dtype, **options):
    """A Llama whose norms have no gain."""
    model = tiny(LLAMA, torch.float32)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            made = flashnorm.nn.FlashRMSNorm(LLAMA.hidden_size, **options)
            setattr(model.get_submodule(parent), name, made)
    return model.to(dtype).eval()


def graph(model, rows):
    """The names of operations in the graph of so many rows, whose result is checked."""
    ours = flashnorm.accelerate_(copy.deepcopy(model))
    tokens = ids(1, rows)
    found, names = graph_of(ours, tokens)
    dtype = next(model.parameters()).dtype
    assert close(found, logits(model, tokens), dtype)
    return names


def scaled_later(model, rows):
    """How many norms of the graph have their scale in the products of x."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        run = deferred.gated
        patch.setattr(deferred, "gated", lambda call: seen.append(1) or run(call))
        graph(model, rows)
    return len(seen)


@pytest.mark.parametrize(("dtype", "rows"), [(HALF, 40), (torch.float32, 1), (torch.float32, 40)])
def test_gated_pairs_are_scaled_after_their_products(dtype, rows):
    assert scaled_later(weightless(dtype), rows) == 2


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (lambda: weightless(HALF), 1),  # which a kernel takes
        (lambda: weightless(torch.float16), 40),
        (lambda: tiny(LLAMA, HALF), 40),  # with a gain
        (lambda: weightless(HALF, bias=nn.Parameter(torch.randn(64))), 40),
    ],
)
def test_what_is_not_a_plain_norm_of_many_rows_is_let_be(model, rows):
    assert scaled_later(model(), rows) == 0


def test_autocast_and_hooks_keep_the_model_s_own_operations():
    model = weightless(torch.float32)
    with torch.autocast("cpu", HALF):
        ours = flashnorm.accelerate_(copy.deepcopy(model))
        assert close(graph_of(ours, ids(1, 40))[0], logits(model, ids(1, 40)), HALF)

    def doubled(module, args, z):
        return 2 * z

    model.model.layers[0].post_attention_layernorm.register_forward_hook(doubled)
    assert scaled_later(model, 40) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("bias", [False, True])
def test_errors_are_no_larger_than_the_model_s_own(activation, dtype, scale, bias):
    """Against float64, over all elements: rounded less often, never more."""
    generator = torch.Generator().manual_seed(3)

    def made(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights = scale * made(64, 256), [made(96, 256) / 16 for _ in range(2)]
    biases = [made(96) for _ in range(2)] if bias else None
    narrow = Call(
        x.to(dtype),
        [w.to(dtype) for w in weights],
        None if biases is None else [c.to(dtype) for c in biases],
        norms.RMS,
        1e-6,
        activation=activation,
    )
    wide = narrow._replace(
        x=narrow.x.double(),
        weights=[w.double() for w in narrow.weights],
        biases=None if biases is None else [c.double() for c in narrow.biases],
    )
    found = deferred.gated(narrow)
    if dtype is torch.float32:  # z is rounded as often as s·a: neither is always the better one
        assert_close(narrow, [found])
    else:
        (truth,), (own,) = reference.norm_linear(wide), reference.norm_linear(narrow)
        assert (found.double() - truth).norm() <= (own.double() - truth).norm()
