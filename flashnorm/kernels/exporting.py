"""Whether a program is exported, as code that torch.compile reads may ask."""

from __future__ import annotations

import torch

from flashnorm.compat.torch_names import export_flag


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export runs: the program must run where flashnorm is not installed."""
    return export_flag()
