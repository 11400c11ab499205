"""A tensor of which operations read the rows that they need: [.., k, n] of a floating dtype.

What holds the rows is a matter of its kind: blocks of packed bytes, or files. A matrix is
multiplied in blocks of rows, an embedding reads the rows of its tokens, and what knows no rows
reads all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashnorm.compat.torch_names import no_torch_function
from flashnorm.errors import FlashNormError
from flashnorm.quantized.decoding import decoded


class RowTensor(Tensor):
    """A weight [.., k, n] that is not in memory as such; it has no gradient.

    held: its rows, those of all leading dimensions one behind the other. turned: this is the
    transpose of them, [n, k]. Operations that write in place, and those that ask for its memory,
    raise FlashNormError. Rows and matrices of it are views; what other views give (`view`,
    `w[:, 3]`) is a copy in memory. `WHAT` says what it is, `MEND` how it becomes plain.
    """

    held: Any  # decoding.Rows
    turned: bool
    WHAT: ClassVar[str]
    MEND: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, held: Any, shape: Sequence[int], turned: bool = False) -> RowTensor:
        """The same kind of tensor of other rows, in the same dtype."""
        return type(self)(held, shape, self.dtype, turned)

    def again(
        self,
        dtype: torch.dtype | None = None,
        device: Any = None,
        non_blocking: bool = False,
        copied: bool = False,
    ) -> RowTensor:
        """The same numbers as another tensor, perhaps rounded to another dtype."""
        raise NotImplementedError

    def write_(self, source: Tensor, non_blocking: bool = False) -> RowTensor:
        """What `copy_` does; most kinds cannot."""
        raise FlashNormError(f"this would write into {self.WHAT}: {self.MEND}")

    def dequantize(self) -> Tensor:
        """All its numbers as a plain tensor of its shape and dtype."""
        rows = decoded(self.held, self.dtype)
        return rows.T if self.turned else rows.view(self.shape)

    # What would hand out memory that does not hold numbers of this dtype, or write into it, where
    # no operation is asked. `untyped_storage` tells tensors apart and has no address.

    def _no_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise FlashNormError(f"{self.WHAT} has no plain memory: {self.MEND}")

    data_ptr = storage = numpy = __array__ = __dlpack__ = _no_memory

    def __setitem__(self, *args: Any) -> None:
        raise FlashNormError(f"this would write into {self.WHAT}: {self.MEND}")

    def requires_grad_(self, requires_grad: bool = True) -> RowTensor:
        self.requires_grad = requires_grad
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            raise FlashNormError(f"{self.WHAT} has no gradient: {self.MEND}")

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from flashnorm.quantized.row_operations import run

        return run(func, args, kwargs or {})
