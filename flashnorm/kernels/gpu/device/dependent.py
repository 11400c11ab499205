"""A kernel that starts before the one in front of it has ended (programmatic dependent launch).

Before `wait` a program may touch nothing that another kernel writes, and writes nothing. `ahead`
is allowed there whatever is written: it only says which memory will be read.
"""

import triton
import triton.language as tl
import triton.language.extra.cuda as cuda

LINE = tl.constexpr(128)  # bytes that the caches of a GPU hold together


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on all that the kernels before have written is seen."""
    if PDL:
        cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may start, once all programs of this one are here."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def ahead(at_rows, first, last, LINES: tl.constexpr):
    """Ask for elements `first` to `last` of rows in the second cache, at most LINES lines of each.

    at_rows: [rows], pointers to element 0.
    """
    each: tl.constexpr = LINE // (at_rows.dtype.element_ty.primitive_bitwidth // 8)
    deep = tl.minimum(first + tl.arange(0, LINES) * each, tl.maximum(last - 1, 0))
    place = (at_rows[:, None] + deep[None, :]).to(tl.uint64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [place],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
