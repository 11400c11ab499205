"""Who reads a model's hidden states beside its own head, in an engine.

A fold moves the final gain into the head, and other gains into the linear layers that read them.
The logits of the model stay the same; what another reader sees of a folded norm does not.
"""

from __future__ import annotations

from dataclasses import dataclass

ADAPTERS = (
    "adapters were trained on the original weights, and are wrong on folded ones: write a folded "
    "checkpoint (flashnorm fold), make the adapters fit it (flashnorm fold-adapter), and serve both"
)
POOLED = (
    "the hidden states themselves are the result here, and a fold takes the gain of the final norm "
    "out of them: load the checkpoint without flashnorm"
)
DRAFT = (
    "a draft model ({}) reads the hidden states that a fold changes: load the checkpoint without "
    "flashnorm, or draft without them (ngram)"
)
# Drafts that read tokens alone.
TOKENS = frozenset({"ngram", "suffix", "draft_model"})


@dataclass(frozen=True)
class Asked:
    """What an engine was asked to do with a model beside generating from its logits."""

    adapters: bool = False
    pooled: bool = False
    draft: str = ""


def why_not(asked: Asked) -> str:
    """Why a checkpoint may not be folded while loading; empty if it may."""
    if asked.adapters:
        return ADAPTERS
    if asked.pooled:
        return POOLED
    if asked.draft and asked.draft not in TOKENS:
        return DRAFT.format(asked.draft)
    return ""
