"""From the parameter names of a model to the keys of its checkpoint.

The two are equal but for the prefix of the base model, which a checkpoint written from the base
model alone does not have, and which one written from a model with a head has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from flashnorm.errors import CheckpointError

REMEDY = "load the model with transformers, use fold_ on it, then save_pretrained"


def resolve_names(parameters: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """For each parameter the key that holds it, under one and the same prefix rule for all.

    Raises CheckpointError where a parameter has no key, where it could have several, where two
    have the same, and where two parameters would need different prefixes.
    """
    known = set(keys)
    prefixes = {key.split(".", 1)[0] for key in known if "." in key}
    found = {name: _resolve(name, known, prefixes) for name in parameters}
    _check_one_rule(found)
    _check_distinct(found)
    return found


def _resolve(name: str, keys: set[str], prefixes: set[str]) -> str:
    if name in keys:
        return name
    candidates = {f"{prefix}.{name}" for prefix in prefixes} | {name.partition(".")[2]}
    matches = sorted(candidates & keys)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise CheckpointError(
            f"the parameter {name} could be any of {', '.join(matches)} in the checkpoint; {REMEDY}"
        )
    raise CheckpointError(
        f"the parameter {name} is not in the checkpoint under a name that flashnorm can map; "
        f"{REMEDY}"
    )


def _check_one_rule(found: dict[str, str]) -> None:
    """A base model has one prefix, so names that differ must all differ by the same one."""
    rules = {_rule(name, key): name for name, key in found.items() if name != key}
    if len(rules) > 1:
        pairs = ", ".join(f"{name} by {rule}" for rule, name in sorted(rules.items()))
        raise CheckpointError(
            f"the checkpoint's names differ from the model's in several ways ({pairs}); {REMEDY}"
        )


def _rule(name: str, key: str) -> str:
    if len(key) > len(name):
        return f"+{key.removesuffix(name)}"
    return f"-{name.removesuffix(key)}"


def _check_distinct(found: dict[str, str]) -> None:
    holders: dict[str, str] = {}
    for name, key in found.items():
        if holders.setdefault(key, name) != name:
            raise CheckpointError(
                f"the parameters {holders[key]} and {name} both map to the tensor {key}"
            )
