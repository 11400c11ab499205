"""A tiny random instance, by rule, of every causal-LM model type of the installed transformers."""

from tests.zoo.build import causal_lm_types, randomize_, tiny_inputs, tiny_model
from tests.zoo.shrink import tiny_config

__all__ = ["causal_lm_types", "randomize_", "tiny_config", "tiny_inputs", "tiny_model"]
