"""Checkpoints on disk: every shard is read once and written once, in little memory."""
