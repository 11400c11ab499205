"""What was measured on this machine's cards: a JSON file, read once, never written on the way.

    {"version": 1, "devices": {name: {key: {"way": .., "note": .., "tile": {..} or null}}}}

It is FLASHNORM_GPU_CACHE, or flashnorm/gpu.json in the user's cache folder. `measure` writes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flashnorm.kernels import measurements
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu.launch import Device, Tile, power_of_two
from flashnorm.kernels.weights import AnyWeight, Weight

VERSION = 1
LARGEST_TILE = 1 << 16


@dataclass(frozen=True)
class Entry:
    """The fastest way of a call, its tile where that is not the default, and what was measured."""

    way: str
    note: str
    tile: Tile | None = None


def key_of(call: Call) -> str:
    """What a measurement holds for: dtype, norm, widths, and rows up to the next power of two."""
    x = call.x
    count = x.numel() // x.shape[-1]
    widths = "+".join(str(w.shape[0]) + _format(w) for w in call.weights)
    norm = call.norm.name + ("*gain" if call.gain is not None else "")
    norm += "+bias" if call.norm_bias is not None else ""
    after = (call.activation or "linear") + (
        "+residual" if call.output_residual is not None else ""
    )
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{dtype} {norm} {x.shape[-1]}->{widths} {after} rows<={power_of_two(max(count, 1))}"


def _format(weight: AnyWeight) -> str:
    """The format of a packed weight, and the features that share a scale."""
    if not isinstance(weight, Weight):
        return ""
    return f" {weight.format.name}" + (f" of {weight.group}" if weight.group else "")


def find(call: Call, device: Device) -> Entry | None:
    entries = _loaded().get(device.name)
    return None if entries is None else entries.get(key_of(call))


def forget() -> None:
    """Read the file again at the next call."""
    _loaded.cache_clear()


@cache
def _loaded() -> dict[str, dict[str, Entry]]:
    return measurements.read(path(), VERSION, _parse)


def path() -> Path | None:
    return measurements.path("FLASHNORM_GPU_CACHE", "gpu.json")


def _parse(found: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    return {
        device: {key: _entry(value) for key, value in entries.items()}
        for device, entries in found["devices"].items()
    }


def _entry(value: dict[str, Any]) -> Entry:
    if value["way"] not in ("skinny", "gemm", "matmul"):
        raise ValueError(f"no way {value['way']!r}")
    tile = value.get("tile")
    return Entry(value["way"], str(value["note"]), None if tile is None else _tile(tile))


def _tile(value: dict[str, Any]) -> Tile:
    """Raises ValueError for numbers that no launch has."""
    found = Tile(**value)
    if not all(type(n) is int and 0 < n <= LARGEST_TILE for n in asdict(found).values()):
        raise ValueError(f"no tile: {value}")
    return found


def store(device: Device, found: dict[str, Entry]) -> Path | None:
    """Add measurements to the file, in place of older ones of the same calls; None: it is off."""
    if (file := path()) is None:
        return None
    devices = {n: dict(entries) for n, entries in measurements.read(file, VERSION, _parse).items()}
    devices.setdefault(device.name, {}).update(found)
    whole = {
        name: {key: asdict(entry) for key, entry in sorted(entries.items())}
        for name, entries in devices.items()
    }
    measurements.write(file, {"version": VERSION, "devices": whole})
    forget()
    return file
