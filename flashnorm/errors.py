"""The errors of flashnorm: one class, a few children, each raised with what to do next."""


class FlashNormError(Exception):
    """Base class of every error that flashnorm raises on purpose."""


class TraceError(FlashNormError):
    """The model could not be recorded as a graph, so nothing can be said about it."""


class PlanError(FlashNormError, ValueError):
    """What was read as a plan is none, or one of another version."""


class FoldError(FlashNormError):
    """A planned rewrite would not be exact (overflow, subnormals, a missing tensor)."""


class CheckpointError(FlashNormError):
    """A checkpoint cannot be read as it stands, or its target cannot be written."""


class QuantizedError(CheckpointError):
    """The weights are quantized: a per-input-channel gain does not fit their scales."""
