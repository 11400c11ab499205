"""What a backend is asked to do, written down."""

from flashnorm.kernels.backend import Backend
from flashnorm.kernels.cpu import backend as cpu
from tests.toys import numpy_backend


def recorded(backend: Backend, monkeypatch) -> list[tuple[int, ...]]:
    """A list that grows by the widths of the results of every call of a bound kernel."""
    made: list[tuple[int, ...]] = []
    bound = cpu.Packed if backend is cpu.CPU else numpy_backend.Bound
    run, both = bound.run, bound.normalize_and_run

    def counted_run(self, x, output_residual=None):
        results = run(self, x, output_residual)
        made.append(tuple(y.shape[-1] for y in results))
        return results

    def counted_both(self, x, z):
        before = len(made)
        found = both(self, x, z)
        del made[before:]  # where the one calls the other
        made.append(tuple(y.shape[-1] for y in found[1]))
        return found

    monkeypatch.setattr(bound, "run", counted_run)
    monkeypatch.setattr(bound, "normalize_and_run", counted_both)
    return made


def attended(backend: Backend, monkeypatch) -> list[int]:
    """A list that grows by the length of the keys of every call of the attention kernel."""
    made: list[int] = []
    kind = type(backend.attention)
    attend = kind.attend

    def counted(self, q, k, v, scale, mask=None):
        made.append(k.shape[2])
        return attend(self, q, k, v, scale, mask)

    monkeypatch.setattr(kind, "attend", counted)
    return made
