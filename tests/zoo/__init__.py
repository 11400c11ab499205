"""A tiny random instance, by rule, of every causal-LM model type of the installed transformers."""

from .build import causal_lm_types, randomize_, tiny_inputs, tiny_model, variants
from .overrides import UNBUILDABLE
from .shrink import tiny_config

__all__ = [
    "UNBUILDABLE",
    "causal_lm_types",
    "randomize_",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
    "variants",
]
