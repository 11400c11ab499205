"""Spellings of operations whose rule would be wrong if it looked at the name alone."""

import torch

from .adversarial import Base, N


class LerpWeight(Base):
    """The gain decides how two other values are mixed."""

    def forward(self, x):
        return self.reader(torch.lerp(x, x.flip(1), self.norm(x)))


class ScatteredFeatures(Base):
    """Rows may be written by an index, features may not; the axis counts from the end."""

    def forward(self, x):
        y = self.norm(x)
        index = torch.arange(N).flip(0).expand(x.shape)
        return self.reader(torch.zeros_like(y).scatter(-1, index, y))


class AddedFeatures(Base):
    def forward(self, x):
        y = self.norm(x)
        return self.reader(torch.zeros_like(y).index_add(-1, torch.arange(N).flip(0), y))


class FloorDivision(Base):
    def forward(self, x):
        return self.reader(torch.div(self.norm(x), 0.3, rounding_mode="floor"))


class IntegerCast(Base):
    def forward(self, x):
        return self.reader((self.norm(x) * 8).long().to(x.dtype))


class FlooredReader(Base):
    """The reader's weight is rounded down: its columns are no longer multiples of themselves."""

    def forward(self, x):
        weight = torch.div(self.reader.weight, 0.3, rounding_mode="floor")
        return torch.nn.functional.linear(self.norm(x), weight)


class MaskedRows(Base):
    """Whole rows written through a mask over rows."""

    def forward(self, x):
        y = self.norm(x)
        mask = torch.arange(5).expand(2, 5) > 1
        out = torch.zeros_like(y)
        out[mask] = y[:, 2:].reshape(-1, N)
        return self.reader(out)


class MaskedFeatures(Base):
    """Features moved through a mask over features: the fold would hit the wrong columns."""

    def forward(self, x):
        y = self.norm(x)
        mask = (torch.arange(N) > 1).expand(x.shape)
        out = torch.zeros_like(y)
        out[mask] = y[..., : N - 2].reshape(-1)
        return self.reader(out)


class StridedState(Base):
    """A column of a state is written while another one, still zero, is read and kept alive."""

    def forward(self, x):
        y, state = self.norm(x), x.new_zeros(2, N, 2)
        old, shifted = state[:, :, 1], torch.nn.functional.pad(y, (0, 0, 1, -1))
        shifted[:, 0] = old
        state[:, :, 0] = y[:, -1]
        return self.reader(0.3 * y + 0.7 * shifted) + self.reader(state[:, :, 0] + old)[:, None]


class StridedStateOverwritten(StridedState):
    """The column that is read is written with other values meanwhile."""

    def forward(self, x):
        y, state = self.norm(x), x.new_zeros(2, N, 2)
        old = state[:, :, 1]
        state[:, :, 0] = y[:, -1]
        state[:, :, 1] = x[:, -1]
        return self.reader(y) + self.reader(state[:, :, 0] + old)[:, None]
