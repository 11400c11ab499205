"""Counters by which programs of one launch learn which of them is the last.

They are zero before a launch, and the last program leaves them so. A launch outside of a capture
is given new ones. A captured launch runs many times, and two graphs may run side by side: each is
given a part of its own of what `reserve` has set to zero, which no other launch is ever given.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SIZE = 1 << 18  # counters of a device: for about a hundred graphs of a model
ALIGNED = 4  # counters: 16 bytes, because Triton compiles another kernel for other addresses

_free: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def reserve(device: torch.device) -> None:
    """Set counters for captured launches to zero; outside of captures, and of what they allocate.

    Without them a captured launch sets its own to zero, each time that it runs.
    """
    if device.type == "cuda" and device not in _free:
        _free[device] = torch.zeros(SIZE, dtype=torch.int32, device=device)


def take(count: int, device: torch.device) -> Tensor:
    """[count] zeros, int32, for one launch on the current stream."""
    if device in _free and torch.cuda.is_current_stream_capturing():
        with _lock:
            free = _free[device]
            if len(free) >= count:
                _free[device] = free[-(-count // ALIGNED) * ALIGNED :]
                return free[:count]
    return torch.zeros(count, dtype=torch.int32, device=device)
