"""What a user asks for: a directory, and for which caches and batches."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flashnorm.errors import FlashNormError


@dataclass(frozen=True)
class Package:
    """A decode step to be kept in `directory`: for `batch` sequences of up to `length` tokens.

    Memory for a cache of `length` tokens is reserved when a sequence is decoded. Longer sequences
    and other batches run as without a package. Raises FlashNormError for a batch below 1 or a
    length below 2.
    """

    directory: str | os.PathLike[str]
    length: int = 2048
    batch: int = 1

    def __post_init__(self) -> None:
        if self.length < 2 or self.batch < 1:
            raise FlashNormError(
                f"a package is for one sequence or more, and two tokens or more: batch "
                f"{self.batch}, length {self.length}"
            )
