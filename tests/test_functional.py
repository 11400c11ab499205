"""Every identity of deferral against what it replaces, in float64, with random gains and biases."""

import pytest
import torch
from torch.nn import functional as F

from flashnorm import functional as identities

N, K, M, EPS = 48, 40, 72, 1e-3
# Two orders of summing `width` products differ by width · 2⁻⁵³ at most, a few times over.
BOUND = 8 * M * 2.0**-53


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).double()


@pytest.fixture
def x():
    # Rows of very different size, with a mean that a LayerNorm must take out.
    return random(3, 5, N) * torch.logspace(-2, 2, 5).double()[:, None] + 0.7


def gain(width):
    return 1 + 0.3 * random(width, seed=9)


def rms(x):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def close(found, expected):
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("has_bias", [False, True])
def test_e4_the_scale_after_the_product(x, has_bias):
    weight, g, bias = random(K, N), gain(N), random(K) if has_bias else None
    expected = F.linear(rms(x) * g, weight, bias)
    close(identities.deferred_linear(x, weight * g, bias, EPS), expected)


@pytest.mark.parametrize("has_bias", [False, True])
def test_e5_the_mean_and_the_scale_after_the_product(x, has_bias):
    weight, g, beta = random(K, N), gain(N), random(N)
    bias = random(K) if has_bias else None
    expected = F.linear(F.layer_norm(x, (N,), g, beta, EPS), weight, bias)
    moved = F.linear(beta, weight, bias)  # E2
    close(identities.deferred_layer_linear(x, weight * g, moved, EPS), expected)


def test_e6_dynamic_tanh(x):
    weight, g, beta, bias, alpha = random(K, N), gain(N), random(N), random(K), random(1)
    expected = F.linear(torch.tanh(alpha * x) * g + beta, weight, bias)
    close(identities.dyt_linear(x, weight * g, F.linear(beta, weight, bias), alpha), expected)


def test_e8_relu(x):
    up, down, g = random(M, N), random(N, M), gain(N)
    expected = F.linear(torch.relu(F.linear(rms(x) * g, up)), down)
    close(identities.relu_ffn(x, up * g, down, EPS), expected)


@pytest.mark.parametrize("act", [torch.relu, lambda a: a], ids=["reglu", "bilinear"])
def test_e8_two_factors(x, act):
    gate, up, down, g = random(M, N, seed=1), random(M, N), random(N, M), gain(N)
    y = rms(x) * g
    expected = F.linear(act(F.linear(y, gate)) * F.linear(y, up), down)
    close(identities.reglu(x, gate * g, up * g, down, EPS, act), expected)


def test_e8_is_wrong_for_an_activation_that_is_not_homogeneous(x):
    gate, up, down = random(M, N, seed=1), random(M, N), random(N, M)
    y = rms(x)
    expected = F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    found = identities.reglu(x, gate, up, down, EPS, F.silu)
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("act", [F.silu, F.gelu, torch.sigmoid])
def test_e12_the_linear_half_waits(x, act):
    gate, up, down, g = random(M, N, seed=1), random(M, N), random(N, M), gain(N)
    y = rms(x) * g
    expected = F.linear(act(F.linear(y, gate)) * F.linear(y, up), down)
    close(identities.glu(x, gate * g, up * g, down, EPS, act), expected)


def test_e11_the_sum_instead_of_the_mean(x):
    g = gain(N)
    close(x * identities.sum_scale(x, EPS) * identities.sum_gain(g), rms(x) * g)


HEADS, H, T = 3, 16, 5


@pytest.fixture
def tables():
    angles = torch.outer(torch.arange(T), 10.0 ** -torch.arange(H // 2)).double()
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def test_e9_the_scale_in_the_tables(x, tables):
    query, key = random(HEADS * H, N), random(HEADS * H, N, seed=1)

    def heads(y, weight):
        return F.linear(y, weight).view(3, T, HEADS, H).transpose(1, 2)

    q, k = (identities.rope(heads(rms(x), w), *tables) for w in (query, key))
    expected = q @ k.transpose(-1, -2) / H**0.5
    s = identities.row_scale(x, EPS)[:, None]
    for_q = identities.scaled_rope_tables(*tables, s, H**-0.5)
    for_k = identities.scaled_rope_tables(*tables, s)
    found_q, found_k = (identities.rope(heads(x, w), *t) for w, t in ((query, for_q), (key, for_k)))
    close(found_q @ found_k.transpose(-1, -2), expected)


def test_e10_a_gain_shared_by_all_heads_in_the_tables(tables):
    u, g = random(3, HEADS, T, H), gain(H)
    expected = identities.rope(rms(u) * g, *tables)
    close(identities.rope(rms(u), *identities.shared_gain_tables(*tables, g)), expected)


def test_e10_the_gain_of_the_other_half_meets_the_sine(tables):
    """Taking g itself for both tables, as a first guess would, is wrong."""
    u, g = random(3, HEADS, T, H), gain(H)
    expected = identities.rope(rms(u) * g, *tables)
    cos, sin = tables
    wrong = identities.rope(rms(u), cos * g, sin * g)
    assert (wrong - expected).abs().max() > 1e-2


def test_e10_channels_without_rotation_take_the_product_of_both_gains():
    q, k = random(3, HEADS, T, H), random(3, HEADS, T, H, seed=1)
    g_q, g_k = gain(H), 1 + 0.3 * random(H, seed=5)
    expected = (rms(q) * g_q) @ (rms(k) * g_k).transpose(-1, -2)
    still = (torch.ones(T, H).double(), torch.zeros(T, H).double())
    cos, sin = identities.shared_gain_tables(*still, g_q * g_k)
    close(identities.rope(rms(q), cos, sin) @ rms(k).transpose(-1, -2), expected)


def test_e10_the_scale_of_the_norm_before_cancels(x):
    """`RMS(s·v) = RMS(v)` but for epsilon: v without the norm before it, ε divided by s²."""
    weight = random(HEADS * H, N)
    v = F.linear(rms(x), weight).view(3, T, HEADS, H)
    raw = F.linear(x, weight).view(3, T, HEADS, H)
    s = identities.row_scale(x, EPS).unsqueeze(-1)
    found = raw * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + EPS / s**2)
    close(found, rms(v))


@pytest.mark.parametrize("channels", [1, 7])
def test_an_odd_head_has_no_halves(channels):
    """torch would cut it into parts of different sizes, and turn the wrong channels."""
    u, cos, sin, g = (random(*shape) for shape in ((4, channels),) * 3 + ((channels,),))
    with pytest.raises(ValueError, match=f"{channels} channels are no two halves"):
        identities.rope(u, cos, sin)
    with pytest.raises(ValueError, match=f"{channels} channels are no two halves"):
        identities.shared_gain_tables(cos, sin, g)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_numbers_without_a_norm_are_refused(dtype):
    """Rounded to whole numbers, a norm would be wrong without a word."""
    x, weight = torch.ones(2, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    for call in (identities.norm_linear, identities.rms_norm_linear, identities.explain):
        with pytest.raises(ValueError, match=rf"x is {dtype}; it must have a floating dtype"):
            call(x, weight)
    with pytest.raises(ValueError, match="it must have a floating dtype"):
        identities.Prepared([weight])(x)
