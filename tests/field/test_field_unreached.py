"""Modules, experts and streams that the recorded pass did not use: edits near them are in doubt."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from tests.errors import relative
from tests.field.test_field_recording import EXACT, WIDTH, X, randomize_

X64 = X.double()


class Model(nn.Module):
    """What `kind` 0 computes is recorded; 1 takes another way. Subclasses have the parts."""

    def __init__(self):
        super().__init__()
        self.parts()
        randomize_(self.double())


class Block(nn.Module):
    def __init__(self, norm, width=WIDTH):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(WIDTH, width, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x))


class SharedNorm(Model):
    """One norm in two blocks, of which one runs."""

    def parts(self):
        norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.blocks = nn.ModuleList([Block(norm), Block(norm)])

    def forward(self, x, kind=0):
        return self.blocks[kind](x)


class SharedGain(SharedNorm):
    """The same gain in two norms."""

    def parts(self):
        self.blocks = nn.ModuleList([Block(nn.RMSNorm(WIDTH, eps=1e-6)) for _ in range(2)])
        self.blocks[1].norm.weight = self.blocks[0].norm.weight


class SharedBias(SharedNorm):
    """The same bias: in the other norm it stands behind a gain that is a buffer."""

    def parts(self):
        self.blocks = nn.ModuleList([Block(nn.LayerNorm(WIDTH)), Block(nn.LayerNorm(WIDTH))])
        self.blocks[1].norm.bias = self.blocks[0].norm.bias
        del self.blocks[1].norm.weight
        self.blocks[1].norm.register_buffer("weight", 1 + torch.rand(WIDTH))


class IdleExpert(Model):
    """An expert that is called with no rows: its weight is transposed, nothing is multiplied."""

    def parts(self):
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])

    def forward(self, x, kind=0):
        rows = self.norm(x).flatten(0, -2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = torch.nonzero(torch.full((len(rows),), number == kind))[:, 0]
            out = out.index_add(0, chosen, expert(rows[chosen]))
        return out


FOLDS = [SharedNorm, SharedGain, SharedBias, IdleExpert]


class Writers(Model):
    """Two writers before one LayerNorm, one of which runs."""

    def parts(self):
        self.writers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x, kind=0):
        return self.head(self.norm(self.writers[kind](x)))


class AddedVector(Writers):
    """A vector that is added for the other kind."""

    def parts(self):
        super().parts()
        del self.writers[1]
        self.added = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x, kind=0):
        h = self.writers[0](x)
        return self.head(self.norm(h + self.added if kind else h))


class ReadWithoutNorm(AddedVector):
    """What the LayerNorm reads is read as it is for the other kind."""

    def parts(self):
        super().parts()
        self.other = nn.Linear(WIDTH, 5)

    def forward(self, x, kind=0):
        h = self.writers[0](x)
        return self.other(h) + self.added[0] if kind else self.head(self.norm(h))


class WriterBank(Writers):
    """Rows of a bank of writers; another is read for the other kind, without a norm."""

    def parts(self):
        super().parts()
        self.writers = nn.ParameterList([torch.empty(2, WIDTH, WIDTH)])

    def forward(self, x, kind=0):
        h = F.linear(x, self.writers[0][kind])
        return self.head(h if kind else self.norm(h))


class SharedLayerNorm(Writers):
    """The LayerNorm itself is used elsewhere, on what no linear layer writes."""

    def parts(self):
        norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.writer = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(norm), Block(norm)])
        self.blocks[1].linear = nn.Identity()

    def forward(self, x, kind=0):
        return self.blocks[1](x) if kind else self.blocks[0](self.writer(x))


class SharedEntry(Writers):
    """Values that no linear layer writes are centered as they come out of a module that is also a
    part of a block that does not run."""

    def parts(self):
        self.act, self.heads = nn.GELU(), nn.ModuleList([nn.Linear(WIDTH, 5) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in "123"])
        self.block = nn.Sequential(self.act)

    def forward(self, x, kind=0):
        if kind:
            return self.block(x)
        h = self.act(x)
        return sum(head(norm(h)) for head, norm in zip(self.heads, self.norms, strict=True))


CENTERS = [SharedEntry, Writers, AddedVector, ReadWithoutNorm, WriterBank, SharedLayerNorm]


class Undone(Model):
    """norm -> linear -> norm, where the second undoes the first's scale; or another way."""

    def parts(self):
        self.norm = nn.RMSNorm(WIDTH, eps=0.3)
        self.inner = nn.RMSNorm(WIDTH, eps=0.3)
        self.reader, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.extra = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, kind=0):
        z = self.norm(x)
        return self.out(self.extra(z) if kind else self.inner(self.reader(z)))


class UndoneElsewhere(Undone):
    """The norm that undoes it is a part of a block that does not run."""

    def parts(self):
        super().parts()
        self.extra = Block(self.inner)
        self.extra.linear = nn.Identity()

    def forward(self, x, kind=0):
        return self.extra(x) if kind else self.out(self.inner(self.reader(self.norm(x))))


class ScaledElsewhere(UndoneElsewhere):
    """The norm whose scale would go is."""

    def parts(self):
        super().parts()
        self.extra.norm = self.norm


CANCELS = [Undone, UndoneElsewhere, ScaledElsewhere]
CASES = [
    *((cls, {}) for cls in FOLDS),
    *((cls, {"center": True}) for cls in CENTERS),
    *((cls, {"cancel": True}) for cls in CANCELS),
]


def outputs(model):
    return [model(X64, kind).detach() for kind in (0, 1)]


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_field_what_is_used_elsewhere_is_not_edited(cls, options, untie):
    model = cls()
    expected = outputs(model)
    plan = flashnorm.folding(flashnorm.fold_(model, (X64,), untie=untie, **options))
    for found, truth in zip(outputs(model), expected, strict=True):
        assert relative(found, truth) <= EXACT, str(plan)
    said = " ".join(
        f"{site.reason} {site.centering_reason} {site.scale_reason}" for site in plan.sites
    )
    assert any(why in said for why in ("not reach", "in part", "linear layers alone")), said


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_field_inputs_that_reach_it_settle_it(cls, options):
    """Nothing is in doubt any more, and nothing wrong."""
    model = cls()
    expected = outputs(model)
    plan = flashnorm.folding(flashnorm.fold_(model, [(X64,), (X64, 1)], **options))
    for found, truth in zip(outputs(model), expected, strict=True):
        assert relative(found, truth) <= EXACT, str(plan)
    for site in plan.sites:
        assert "not reach" not in f"{site.reason}{site.centering_reason}{site.scale_reason}"


@pytest.mark.parametrize(
    ("cls", "options", "done"),
    [
        (IdleExpert, {}, lambda plan: plan.folded),
        (Writers, {"center": True}, lambda plan: len(plan.centerings) == 4),
        (AddedVector, {"center": True}, lambda plan: len(plan.centerings) == 3),
    ],
)
def test_field_what_is_settled_is_edited(cls, options, done):
    assert done(flashnorm.inspect(cls(), [(X64,), (X64, 1)], **options))


def test_field_centering_by_entries_alone_is_done():
    """Nothing folds and no weight is centered: the norms are replaced all the same."""
    model = SharedEntry()
    del model.block
    expected = model(X64)
    plan = flashnorm.folding(flashnorm.fold_(model, (X64,), center=True))
    assert plan.entries
    assert not plan.centerings
    assert all(isinstance(norm, flashnorm.nn.FlashRMSNorm) for norm in model.norms)
    assert relative(model(X64).detach(), expected.detach()) <= EXACT
    flashnorm.unfold_(model)
    assert all(isinstance(norm, nn.LayerNorm) for norm in model.norms)
