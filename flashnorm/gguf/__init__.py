"""Models from GGUF files, whose weights stay packed as they lie in the file.

`file`: what a file holds. `routes`: which tensors make which parameter, by transformers' own code.
`rearranged`: what that code does to rows, found with tensors that take no memory. `model`: the
model.
"""

from flashnorm.gguf.model import Loaded, load_gguf, loaded

__all__ = ["Loaded", "load_gguf", "loaded"]
