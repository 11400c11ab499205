"""The packed formats that are known, a file for each family: layout, reference, registration.

Reading a weight that somebody else has packed is `flashnorm.quantized`; decoding it at the speed of
memory is `csrc/packed.h`.
"""

from flashnorm.kernels.formats import blocks, codebook, columns, groups, rows

__all__ = ["blocks", "codebook", "columns", "groups", "rows"]
