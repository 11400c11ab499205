"""All specimens, library by library."""

from __future__ import annotations

from importlib import import_module

from .specimen import Specimen

# A file of this folder, and the lists of specimens that it holds.
FILES = {
    "torch_models": ("SPECIMENS", "VISION", "AUDIO"),
    "vit_pytorch": ("SPECIMENS",),
    "x_transformers": ("SPECIMENS",),
    "timm": ("SPECIMENS",),
    "diffusers": ("SPECIMENS",),
    "language": ("LITGPT", "TORCHTUNE", "CLIP", "SENTENCE"),
    "lucidrains": ("SPECIMENS",),
    "science": ("MONAI", "OTHERS"),
    "plain": ("SPECIMENS", "TRANSFORMERS"),
}


def specimens(names: list[str] | None = None) -> list[Specimen]:
    """Those of the given libraries or keys, or all of them."""
    found: list[Specimen] = []
    for file, lists in FILES.items():
        module = import_module(f"tests.beyond.{file}")
        for name in lists:
            found += getattr(module, name)
    return [s for s in found if not names or s.key in names or s.library in names]


def by_key(key: str) -> Specimen:
    return next(s for s in specimens() if s.key == key)
