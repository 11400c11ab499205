"""Opening models to be verified: in memory, or from disk where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.checkpoint.disk_model import opened_on_disk
from flashnorm.checkpoint.source import open_source
from flashnorm.errors import FlashNormError
from flashnorm.loading import load_model, locate, quiet_transformers
from flashnorm.verification.inputs import Inputs, evaluating

Source = nn.Module | str | os.PathLike[str]
Progress = Callable[[int, int, str], None]

FLOAT64 = torch.float64.itemsize
# Of the memory that is free, what a model may take: outputs and activations need the rest.
SHARE = 0.7
LOCATED = 16  # tokens on which the outputs of all modules are held side by side
TOLD = 1 << 28  # bytes between two words of progress


@contextmanager
def opened(
    source: Source, streamed: bool, told: Callable[[int], None] | None = None
) -> Iterator[nn.Module]:
    """The live module itself, in eval mode meanwhile, or a named model, which is let go afterwards.

    `told` is called with the bytes that were read so far, where the weights stay on disk.
    """
    if isinstance(source, nn.Module):
        with evaluating(source):
            yield source
    elif streamed:
        with opened_on_disk(_directory(source), told) as model:
            yield model
    else:
        with quiet_transformers():
            yield load_model(source)


def streams(sources: Sequence[Source], wanted: bool | None) -> bool:
    """Whether named models are read from disk: as `wanted`, else where one would not fit.

    Raises FlashNormError where that is wanted of something that is no directory of safetensors.
    """
    named = [source for source in sources if not isinstance(source, nn.Module)]
    if wanted is not None:
        return wanted and bool([_directory(source) for source in named])
    free = available_memory()
    try:
        needed = max((_bytes_in_memory(_directory(source)) for source in named), default=0)
    except FlashNormError:
        return False  # whoever loads it says why
    return free is not None and needed > SHARE * free


def _directory(source: str | os.PathLike[str]) -> Path:
    place = locate(source)
    path = Path(place["pretrained_model_name_or_path"])
    if "gguf_file" in place or not path.is_dir():
        raise FlashNormError(
            f"{os.fspath(source)} cannot be read from disk while it runs: that takes a local "
            "directory with safetensors"
        )
    return path


def _bytes_in_memory(path: Path) -> int:
    """What a checkpoint takes while it is verified: as it is stored, and in float64."""
    entries = [place.entry for place in open_source(path).where.values()]
    return sum(entry.nbytes + FLOAT64 * entry.numel for entry in entries)


def available_memory() -> int | None:
    """Bytes that this process may still take, by the system and its cgroup; None if unknown."""
    found = [value for value in (_free_in_system(), _free_in_cgroup()) if value is not None]
    return min(found, default=None)


def _free_in_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    sizes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else None


def _free_in_cgroup() -> int | None:
    """Version 2, as containers have it; file pages that can be dropped count as free."""
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(stat["inactive_file"]) + int(stat["active_file"])
    except (OSError, ValueError, KeyError):
        return None


def shortened(inputs: Inputs) -> Inputs:
    """The first tokens of a window of token ids; other inputs as they are."""
    if not isinstance(inputs, Mapping) or not all(map(_is_ids, inputs.values())):
        return inputs
    return {name: value[:, :LOCATED] for name, value in inputs.items()}


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()


class Stepper:
    """Tells progress: a call begins the next step, `told` says how much of it was read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.name, self.before, self.said = -1, "", 0, 0

    def __call__(self, name: str) -> None:
        self.done, self.name, self.before = self.done + 1, name, self.said
        self._say(name)

    def told(self, count: int) -> None:
        """`count` bytes of the present model were read so far."""
        if count < self.said:
            self.before = self.said = 0  # another model
        if count - self.said >= TOLD:
            self.said = count
            self._say(f"{self.name} | {(count - self.before) / 1e9:.1f} GB read")

    def _say(self, name: str) -> None:
        if self.progress is not None:
            self.progress(max(0, self.done), self.total, name)
