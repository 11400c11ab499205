"""Checkpoints on disk: `fold_checkpoint` reads and writes every shard once, in little memory."""

from flashnorm.checkpoint.fold import fold_checkpoint

__all__ = ["fold_checkpoint"]
