"""Damage that knows what it damages: JSON values, JSON text, and bytes."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 63, 64, 65, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**39, 10**41, 10**400),
)
TEXTS = (
    *("", ".", "..", "/", "../x", "../victim.txt", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:\\x"),
    *("a\0b", "\0", "\ud800", "\udfff x", "\u202egnp.exe", "e\u0301", "x" * 300, "x" * 100_000),
    *("model.safetensors", "config.json", ".flashnorm-journal.json", "CON", "/dev/zero", "~/x"),
    *("lora_A", "__proto__", "[bold]", "[/x]", "\x1b[2J", "%s%n", "{0}", "(a+)+$", "(a|a)*b", "("),
)
UNICODE = tuple(text for text in TEXTS if not any("\ud800" <= c <= "\udfff" for c in text))
OTHERS: tuple[Any, ...] = (
    *(None, True, False, 0.5, -0.0, 1e308, -1e-320, float("nan"), float("inf"), [], {}, [[]]),
    *([0], [-1], [2**63, 2**63], [2**32] * 8, [1] * 100, [0, 2**60], {"a": 1}, ["a", 1], "F32"),
)
PLACES = ("NaN", "1e999", "-", '"\\ud83d"', "9" * 5000, "[" * 3000, '{"a":' * 900, "\ufeff", "tru")


def value(rng: Random) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return copy.deepcopy(rng.choice(OTHERS))
    return nested(rng.choice((5, 90, 150)), rng.random() < 0.5)


def nested(depth: int, lists: bool) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found] if lists else {"a": found}
    return found


def changed(rng: Random, whole: Any, edits: int = 3) -> Any:
    """A copy of a JSON value with some of its parts changed."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.choice((1, 1, 2, edits))):
        if rng.random() < 0.01:
            return value(rng)
        holder, key = _place(rng, whole)
        if holder is None:
            return value(rng)
        _edit(rng, holder, key)
    return whole


def _place(rng: Random, whole: Any) -> tuple[Any, Any]:
    """A holder and the key in it, somewhere: deep places are as likely as high ones."""
    places = [(whole, key) for key in _keys(whole)]
    found = (None, None)
    while places:
        found = rng.choice(places)
        inner = found[0][found[1]]
        places = [(inner, key) for key in _keys(inner)]
        if rng.random() < 0.25:
            break
    return found


def _keys(held: Any) -> list[Any]:
    if isinstance(held, dict):
        return list(held)
    return list(range(len(held))) if isinstance(held, list) else []


def _edit(rng: Random, holder: Any, key: Any) -> None:
    kind = rng.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 6:
        other = rng.choice(_keys(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = copy.deepcopy(holder[key])
    elif kind == 2:
        holder.append(copy.deepcopy(holder[key]))
    elif kind == 3 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, 8, 2**32, -(2**32)))
    else:
        holder[key] = value(rng)


def text(rng: Random, whole: Any) -> bytes:
    """A JSON value as bytes, sometimes damaged once more where it is no value any longer."""
    found = json.dumps(whole, ensure_ascii=rng.random() < 0.7)
    kind = rng.randrange(12)
    place = rng.randrange(len(found) + 1)
    if kind == 0:
        found = found[:place]
    elif kind == 1:
        found = found[:place] + rng.choice(PLACES) + found[place:]
    elif kind == 2 and found.startswith("{") and len(found) > 2:
        found = "{" + found[1:-1] + "," + found[1:]  # every key twice
    data = found.encode("utf-8", "surrogatepass")
    return bytes_changed(rng, data, 2) if kind == 3 else data


def bytes_changed(rng: Random, data: bytes, edits: int = 4, end: int | None = None) -> bytes:
    """Bytes with some of them changed, cut, doubled, or taken for a number that is too large."""
    made = bytearray(data)
    for _ in range(rng.randint(1, edits)):
        last = min(len(made), end or len(made))
        if not last:
            return bytes(rng.randbytes(rng.randrange(64)))
        place, kind = rng.randrange(last), rng.randrange(6)
        if kind == 0:
            made[place] = rng.randrange(256)
        elif kind == 1:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        elif kind == 3:
            made[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        elif kind == 4:
            made[place:place] = made[place : place + rng.randrange(1, 64)]
        elif rng.random() < 0.3:
            del made[place:]
        else:
            del made[place : place + rng.randrange(1, 16)]
    return bytes(made)
