"""All specimens, library by library."""

from __future__ import annotations

from importlib import import_module

from .specimen import Specimen

# A library, the file of this folder that has its specimens, and the list that they are in there.
# A file is imported when it is asked for: some libraries take seconds.
LIBRARIES = {
    "torch": ("torch_models", "SPECIMENS"),
    "torchvision": ("torch_models", "VISION"),
    "torchaudio": ("torch_models", "AUDIO"),
    "vit-pytorch": ("vit_pytorch", "SPECIMENS"),
    "x-transformers": ("x_transformers", "SPECIMENS"),
    "timm": ("timm", "SPECIMENS"),
    "diffusers": ("diffusers", "SPECIMENS"),
    "litgpt": ("language", "LITGPT"),
    "torchtune": ("language", "TORCHTUNE"),
    "open-clip": ("language", "CLIP"),
    "sentence-transformers": ("language", "SENTENCE"),
    "lucidrains": ("lucidrains", "SPECIMENS"),
    "monai": ("science", "MONAI"),
    "others": ("science", "OTHERS"),
    "plain": ("plain", "SPECIMENS"),
    "transformers": ("plain", "TRANSFORMERS"),
}


def specimens(names: list[str] | None = None) -> list[Specimen]:
    """Those of the given libraries or keys, or all of them."""
    asked = {name.partition(":")[0] for name in names or LIBRARIES}
    found: list[Specimen] = []
    for library, (file, held) in LIBRARIES.items():
        if library in asked:
            found += getattr(import_module(f"tests.beyond.{file}"), held)
    return [s for s in found if not names or s.key in names or s.library in names]


def by_key(key: str) -> Specimen:
    return specimens([key])[0]
