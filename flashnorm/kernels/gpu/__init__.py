"""Norm + linear on the GPU, in Triton; the interpreter (TRITON_INTERPRET=1) runs it on the CPU.

Three ways run a call: "skinny" streams the weights past a few rows of x, "gemm" is a tiled product
with the scale in its epilogue, "matmul" is the library's product between a norm and a gate of one
pass each. `choose` says which and why, `run` runs it. Triton is imported for the first kernel only.
"""

from flashnorm.kernels.gpu.calls import add_stats, normalize, row_scale, run
from flashnorm.kernels.gpu.ways import Way, choose, why_not

__all__ = ["Way", "add_stats", "choose", "normalize", "row_scale", "run", "why_not"]
