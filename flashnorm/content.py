"""What a file really holds where it is not what its name says: pointers, error pages, archives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashnorm.reading import open_regular

AGAIN = "download it again"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/",
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory",
    ),
    (b"\x1f\x8b", "is compressed by gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it with unzstd"),
    (b"\xfd7zXZ\x00", "is compressed by xz: unpack it with unxz"),
    (b"BZh", "is compressed by bzip2: unpack it with bunzip2"),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
_PICKLE = "is a pickle file of torch: load it with torch.load and write it with safetensors"
# What the readers of these files take for theirs though it begins as something else does.
_WEIGHTS = (".safetensors", ".gguf")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "spiece.model", "*.tiktoken", "sentencepiece*.model")
BESIDE_TOKENIZER = ("merges.txt", "special_tokens_map.json", "added_tokens.json")
MODEL_FILES = ("config.json", "*.index.json", "*.safetensors", "*.gguf")


def why_damaged(file: Path) -> str:
    """What is wrong with the content of a file and how to mend it; empty where nothing is seen.

    Only its beginning is read: Git LFS pointers, pages that a server sent instead, archives, and
    downloads that never began.
    """
    try:
        with open_regular(file) as opened:
            return damage_of(file, opened.read(512))
    except (OSError, ValueError):
        return ""


def damage_of(file: Path, start: bytes) -> str:
    """The same of a file that begins so, wherever it lies. start: up to 512 bytes."""
    if file.suffix.lower() == ".safetensors" and _begins_right(start):
        return ""
    text = start.lstrip().lower()
    found = [what for beginning, what in _BEGINNINGS if start.startswith(beginning)]
    if not start:
        found = [f"is empty: {AGAIN}"]
    elif text.startswith(_MARKUP):
        found = [f"is a page that a server sent instead of the file: {AGAIN}, signed in if need be"]
    elif file.suffix.lower() in _WEIGHTS:
        found += _damaged_weights(file, start)
    elif not start.strip(b"\0"):
        found = [f"begins with nothing but zeros: its download was interrupted, {AGAIN}"]
    return f"{file.name} {found[0]}" if found else ""


def _begins_right(start: bytes) -> bool:
    """Whether this is a safetensors header: its length, whose bytes may spell anything, and `{`."""
    return start[4:9] == b"\0\0\0\0{"


def _damaged_weights(file: Path, start: bytes) -> Iterator[str]:
    is_gguf = file.suffix.lower() == ".gguf"
    if not start.strip(b"\0"):
        yield f"begins with nothing but zeros: its download was interrupted, {AGAIN}"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02")):
        yield _PICKLE
    elif start.startswith(b"GGUF") and not is_gguf:
        yield "is a GGUF file: give it the suffix .gguf, and name the file itself"
    elif is_gguf and not start.startswith((b"GGUF", *(b for b, _ in _BEGINNINGS))):
        yield f"does not begin as a GGUF file does: {AGAIN}"


def damage(path: str | os.PathLike[str], names: Iterable[str] = MODEL_FILES) -> str:
    """What is wrong with a file, or with one of these of a directory; empty where nothing is seen.

    Pickle files count where a directory holds its weights in no other form.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return why_damaged(place)
    found = [file for pattern in names for file in sorted(place.glob(pattern))]
    if names is MODEL_FILES and not any(file.suffix in _WEIGHTS for file in found):
        found += sorted(place.glob("*.bin"))
    return next(filter(None, map(why_damaged, found)), "")
