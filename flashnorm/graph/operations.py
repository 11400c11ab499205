"""Operations that change no element of the one value they read, named once for everybody."""

from __future__ import annotations

# The same elements in the same places, perhaps in another dtype or memory.
CASTS = frozenset(
    {"_to_copy", "to", "type_as", "clone", "detach", "alias", "contiguous", "lift_fresh"}
)

# The same elements in the same order, in another shape.
RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "flatten"})

# Some or all elements, perhaps repeated, in other places.
MOVES = frozenset(
    {
        "t",
        "transpose",
        "permute",
        "movedim",
        "unsqueeze",
        "squeeze",
        "expand",
        "repeat",
        "flip",
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "unflatten",
    }
)
