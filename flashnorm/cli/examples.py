"""What stands below the help of a command: how it is used."""

from __future__ import annotations

LINES = {
    "inspect": ("inspect ./model", "inspect organization/model --all", "inspect ./model --json"),
    "fold": ("fold ./model ./folded", "fold ./model ./folded --untie", "fold model.gguf ./folded"),
    "fold-adapter": ("fold-adapter ./lora ./folded-lora --folded ./folded",),
    "verify": ("verify ./model ./folded", "verify ./model ./folded --quiet --json"),
    "bench": ("bench ./model --dtype bf16 --variants eager,flashnorm --out results/model",),
    "tune": ("tune",),
    "eval": ("eval ./model ./folded --limit 20",),
    "doctor": ("doctor", "doctor --json"),
    "run": ("run -- python serve.py", "run --fold -- transformers serve"),
}


def of(command: str) -> str:
    """The examples of a command; each is a paragraph, so that none is broken or joined."""
    return "\n\n".join(["Examples:", *(f"flashnorm {line}" for line in LINES[command])])
