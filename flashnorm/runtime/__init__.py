"""Models that run on norm + linear kernels: `accelerate_`, and `restore_` to undo it."""

from flashnorm.runtime.accelerate import Acceleration, Part, accelerate_, acceleration, restore_

__all__ = ["Acceleration", "Part", "accelerate_", "acceleration", "restore_"]
