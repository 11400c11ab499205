"""Pieces of kernels: roundings, products, norms of rows, activations.

In Triton's interpreter numpy stands in for the GPU. It has no bfloat16: there a product of two
bfloat16 tiles would multiply their bits, and a conversion would cut digits off instead of rounding.
`product` and `narrow` say both in terms that numpy has; compiled, nothing is left of that.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, with sums in float32. a: [i, n], b: [n, j]."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 rounded to nearest even in another dtype."""
    if INTERPRETED:  # noqa: SIM102 (known when compiled: two conditions, not one)
        if dtype == tl.bfloat16:
            bits = v.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            # As bits, because the interpreter's own conversion is wrong below the normal numbers.
            v = tl.where(v == v, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def is_last(counter, count):
    """Whether this program is the last of `count` that ask; what the others stored is seen then.

    The counter is left at zero. Load what they stored with cache_modifier=".cg".
    """
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def tanh(a):
    """Within three roundings of every a, relatively: `1 − 2/(e^2|a| + 1)`, near 0 a polynomial."""
    square = a * a
    small = 0.002292744815349579
    small = small * square - 0.008343945257365704
    small = small * square + 0.02176891826093197
    small = small * square - 0.053959257900714874
    small = small * square + 0.13333304226398468
    small = small * square - 0.3333333432674408
    small = a + a * (square * small)
    size = tl.abs(a)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small, tl.where(a < 0, -large, large))


@triton.jit
def sigmoid(a):
    """1 / (1 + e^-a), down to the smallest numbers: e^|a| would overflow before the result ends."""
    small = tl.exp(-tl.abs(a))
    return tl.where(a < 0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(a, ACTIVATION: tl.constexpr):
    """The function of a gate, in float32; "identity" too."""
    if ACTIVATION == "relu":
        a = tl.where(a < 0, 0.0, a)  # keeps a NaN
    elif ACTIVATION == "silu":
        a = a * sigmoid(a)
    elif ACTIVATION == "gelu":
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2z)
        a = a * sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    return a


@triton.jit
def power_of_two(largest):
    """f with largest · f in [1, 2), so that squares and sums of a row stay within float32."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_statistics(v, inside, n, eps, NORM: tl.constexpr):
    """s, m and rest of one row: `norm(v) = ((v − m) − rest) s`. v: [width], float32.

    The mean of numbers near 10⁶ is no float32: m is near it, and the rest comes off afterwards.
    So nothing is lost where |mean| is far larger than the deviation.
    """
    f = power_of_two(tl.maximum(tl.max(tl.abs(v)), tl.sqrt(eps)))
    v = v * f
    m = 0.0
    rest = 0.0
    if NORM == "layer":
        m = tl.sum(v) / n
        v = tl.where(inside, v - m, 0.0)
        rest = tl.sum(v) / n
        v = tl.where(inside, v - rest, 0.0)
    s = tl.rsqrt(tl.sum(v * v) / n + eps * f * f)
    return s * f, m / f, rest / f


@triton.jit
def load_rows(at_rows, at, n):
    """Elements `at` of rows of x in float32, and which of them there are: [rows, depth]."""
    inside = (at < n)[None, :]
    return tl.load(at_rows[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def scan_statistics(at_rows, n, eps, NORM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """`row_statistics` of rows too long for registers, in passes over x: [rows] each."""
    zeros = tl.zeros([ROWS, DEPTH], tl.float32)
    steps = tl.arange(0, DEPTH)
    largest = zeros
    for at in range(0, n, DEPTH):
        v, inside = load_rows(at_rows, at + steps, n)
        largest = tl.maximum(largest, tl.abs(v))
    f = power_of_two(tl.maximum(tl.max(largest, axis=1), tl.sqrt(eps)))
    m = tl.zeros([ROWS], tl.float32)
    if NORM == "layer":
        total = zeros
        for at in range(0, n, DEPTH):
            v, inside = load_rows(at_rows, at + steps, n)
            total += v * f[:, None]
        m = tl.sum(total, axis=1) / n
    total = zeros
    squares = zeros
    for at in range(0, n, DEPTH):
        v, inside = load_rows(at_rows, at + steps, n)
        v = tl.where(inside, v * f[:, None] - m[:, None], 0.0)
        total += v
        squares += v * v
    variance = tl.sum(squares, axis=1) / n
    rest = tl.zeros([ROWS], tl.float32)
    if NORM == "layer":
        rest = tl.sum(total, axis=1) / n
        variance = variance - rest * rest
    s = tl.rsqrt(variance + eps * f * f)
    return s * f, m / f, rest / f


@triton.jit
def scale_of_squares(squares, at_rows, n, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """s of an RMSNorm from Σx²; from x itself where the squares have left float32's good range."""
    s = tl.rsqrt(squares / n + eps)
    good = (squares + n * eps > 1e-20) & (squares < 1e36)
    if tl.min(good.to(tl.int32)) == 0:
        s, _m, _rest = scan_statistics(at_rows, n, eps, "rms", ROWS, DEPTH)
    return s


@triton.jit
def function_of_x(v, at, n, gain, offset, norm_bias, alpha, NORM: tl.constexpr):
    """`f(v) · (offset + gain) + β` of [rows, depth] from n, the statistics being applied."""
    if NORM == "dyt":
        if alpha is not None:
            v = v * tl.load(alpha).to(tl.float32)
        v = tanh(v)
    if gain is not None:
        g = tl.load(gain + at, mask=at < n, other=0.0).to(tl.float32)
        v = v * (offset + g)[None, :]
    if norm_bias is not None:
        v = v + tl.load(norm_bias + at, mask=at < n, other=0.0).to(tl.float32)[None, :]
    return v
