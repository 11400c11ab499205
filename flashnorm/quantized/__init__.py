"""Models whose weights are quantized already: packed tensors, read where they lie, never refolded.

The gain is applied to x on load and the scale of a norm after the product, which is exact against
the dequantized weights and needs no fold. Formats are `kernels.formats`. Each origin is one file;
no library of theirs is imported here.
"""

from flashnorm.quantized import bitsandbytes, compressed_tensors, gptq, subclass, torchao

__all__ = ["bitsandbytes", "compressed_tensors", "gptq", "subclass", "torchao"]
