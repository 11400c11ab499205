"""A twin of CUDA graphs on the CPU: it records every operation of a step, and replays them.

Like a graph it executes nothing while it captures (memory is put back, what was made has no
values), runs no Python of the model again, writes every result where it lay, and refuses what has
to wait for the device. Kernels of the backend in numpy are recorded as one operation each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from flashnorm.kernels import backend as kernels
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import CompiledPolicy, Policy
from flashnorm.kernels.gpu import policy as gpu
from flashnorm.runtime.lazy import Lazy
from tests.toys import numpy_backend
from tests.toys.numpy_backend import NumpyBackend

FORBIDDEN = "operation not permitted when stream is capturing"
_aten = torch.ops.aten
WAITS = (_aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.is_nonzero)
FROM_HOST = (_aten.lift_fresh, _aten.lift)  # a constant of Python: a copy that is waited for
EMPTY = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided)


class Recording(TorchDispatchMode):
    """The operations of one capture."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Any] = []
        self.made: dict[int, Tensor] = {}  # a tensor of each storage that began here
        self.written: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what others held: it, and its copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, Lazy) for x in leaves((args, kwargs))):
            return NotImplemented  # its own operations come here again
        packet, schema = function.overloadpacket, function._schema
        if packet in WAITS or packet in FROM_HOST:
            raise RuntimeError(FORBIDDEN)
        written = [self._given(a, i, args, kwargs) for i, a in enumerate(schema.arguments)]
        written = [t for t in leaves(written) if isinstance(t, Tensor)]
        for tensor in written:
            self.keep(tensor)
            self.written[id(tensor)] = tensor
        found = function(*args, **kwargs)
        is_view = not written and any(r.alias_info is not None for r in schema.returns)
        if not is_view:
            results = [t for t in leaves(found) if isinstance(t, Tensor)]
            if written:
                self.entries.append(lambda: function(*args, **kwargs))
            else:
                self.note(results)
                if packet not in EMPTY:
                    self.add(results, lambda: function(*args, **kwargs))
        return found

    @staticmethod
    def _given(argument, place, args, kwargs):
        if argument.alias_info is None or not argument.alias_info.is_write:
            return None
        return args[place] if place < len(args) else kwargs.get(argument.name)

    def keep(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in self.made and place not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[place] = (whole, whole.clone())

    def note(self, results):
        for tensor in results:
            self.made[tensor.untyped_storage().data_ptr()] = tensor

    def add(self, results, again):
        def entry():
            new = [t for t in leaves(again()) if isinstance(t, Tensor)]
            for old, values in zip(results, new, strict=True):
                old.copy_(values)

        self.entries.append(entry)

    def put_back(self):
        for whole, copy in self.before.values():
            whole.copy_(copy)
        for tensor in self.made.values():
            bytes_ = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            bytes_.fill_(255)  # NaN in floats, -1 in integers


def leaves(nest: Any) -> list[Any]:
    if isinstance(nest, dict):
        nest = list(nest.values())
    if isinstance(nest, (list, tuple)):
        return [leaf for part in nest for leaf in leaves(part)]
    return [nest]


class Twin(kernels.Captures):
    """`Captures` of a backend; `fails` is raised in the middle of the next captures."""

    def __init__(self) -> None:
        self.current: Recording | None = None
        self.captures, self.replays = 0, 0
        self.fails: Exception | None = None

    def capture(self, function, device):
        assert self.current is None
        self.captures += 1
        recording = Recording()
        try:
            with recording:
                self.current = recording
                result = function()
                if self.fails is not None:
                    raise self.fails
        finally:
            self.current = None
            with torch.no_grad():
                recording.put_back()

        def replay():
            self.replays += 1
            # Torch does not notice what a graph writes.
            with torch.no_grad(), _unsafe_preserve_version_counter((*recording.written.values(),)):
                for entry in recording.entries:
                    entry()

        return replay, result

    def position(self):
        return object() if self.current is None else len(self.current.entries)

    def depth(self) -> int:
        return self.current is not None


class Bound(numpy_backend.Bound):
    def normalize(self, x: Tensor) -> Tensor:
        (z,) = self.owner.kernel(lambda: [numpy_backend.Bound.normalize(self, x)])
        self.owner.calls.append((self.call.norm.name,))
        return z


@dataclass(frozen=True, eq=False)
class TwinBackend(NumpyBackend):
    """The policy of a GPU on numpy's kernels, which the twin captures.

    calls: (norm, widths of the weights, "residual" where one is added) of every kernel; a norm
    alone is (norm,).
    """

    name: str = "twin"
    policy: Policy = gpu.POLICY
    compiled: CompiledPolicy = gpu.COMPILED
    attention: str = "the twin has no attention"
    captures: Twin = field(default_factory=Twin)
    calls: list[Any] = field(default_factory=list)

    def capturing(self):
        return self.captures.current is not None

    def rows(self, dtype, n, weights, compiled):
        return gpu.rows(dtype, compiled)

    def kernel(self, run):
        """The results of a kernel, as one operation of a capture."""
        with _disable_current_modes():
            found = run()
        if (recording := self.captures.current) is not None:
            recording.note(found)
            recording.add(found, run)
        return found

    def run(self, call):
        widths = [w.shape[0] for w in call.weights]
        more = [] if call.output_residual is None else ["residual"]
        self.calls.append((call.norm.name, *widths, *more))
        return self.kernel(lambda: NumpyBackend.run(self, call))

    def bind(self, call):
        found = super().bind(call)
        if isinstance(found, str):
            return found
        bound = Bound(self, call)
        bound.most = gpu.FEW * call.x.shape[-1]
        return bound


def unwatched(monkeypatch, twin: Twin) -> None:
    """The twin's own mode is none that kernels have to let see: a graph's is not in Python."""
    real = dispatch.count_dispatch_modes
    monkeypatch.setattr(dispatch, "count_dispatch_modes", lambda: real() - twin.depth())
