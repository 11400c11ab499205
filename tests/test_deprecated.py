"""Options by the names that they had: they do what the new ones do, and the caller is told."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app

WIDTH = 16
CENTRE = r"^centre= is called center= now, and the old name goes with the next release$"
EPS = r"^eps= is called epsilon= now, and the old name goes with the next release$"


class Two(nn.Module):
    """A LayerNorm behind linear layers, and an RMSNorm that undoes the scale of another one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.writer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.reader, self.inner = nn.Linear(WIDTH, WIDTH, bias=False), nn.RMSNorm(WIDTH)
        self.outer, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH, bias=False)
        for norm in (self.norm, self.inner, self.outer):
            nn.init.normal_(norm.weight, 1, 0.3)

    def forward(self, x):
        y = self.inner(self.reader(self.norm(self.writer(x))))
        return self.head(self.outer(self.middle(y)))


X = torch.randn(3, WIDTH, dtype=torch.float64)


def model():
    return Two().double()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "gpt2"
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def warned_here(words):
    """The warning, and that it names this file."""
    return pytest.warns(FutureWarning, match=words)


def test_inspect_takes_centre():
    plan = flashnorm.inspect(model(), (X,), center=True)
    assert plan.centerings
    with warned_here(CENTRE) as found:
        assert flashnorm.inspect(model(), (X,), centre=True) == plan
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"centre": True}, {"center": True}, CENTRE),
        ({"cancel": True, "eps": "ignore"}, {"cancel": True, "epsilon": "ignore"}, EPS),
    ],
    ids=["centre", "eps"],
)
def test_fold_takes_old_options(old, new, words):
    first, second, plain = model(), model(), model()
    flashnorm.fold_(first, (X,), **new)
    flashnorm.fold_(plain, (X,))
    with warned_here(words) as found:
        flashnorm.fold_(second, (X,), **old)
    assert [warning.filename for warning in found] == [__file__]
    assert torch.equal(first(X), second(X))
    assert not torch.equal(first(X), plain(X)), "the option does nothing here"


def test_fold_checkpoint_takes_centre(checkpoint, tmp_path):
    plan = flashnorm.fold_checkpoint(checkpoint, tmp_path / "new", center=True)
    with warned_here(CENTRE) as found:
        assert flashnorm.fold_checkpoint(checkpoint, tmp_path / "old", centre=True) == plan
    assert plan.centerings
    assert [w.filename for w in found if w.category is FutureWarning] == [__file__]
    files = [tmp_path / name / "model.safetensors" for name in ("new", "old")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("command", ["inspect", "fold"])
def test_the_commands_take_centre(command, checkpoint, tmp_path):
    def run(option, *target):
        done = CliRunner().invoke(app, [command, str(checkpoint), *target, option, "--json"])
        assert done.exit_code == 0, done.output
        return done

    targets = ([str(tmp_path / name)] if command == "fold" else [] for name in ("new", "old"))
    new, old = (
        run(option, *target)
        for option, target in zip(("--center", "--centre"), targets, strict=True)
    )
    assert "--centre is called --center now" in old.stderr
    assert "--centre" not in new.stderr
    assert (
        new.stdout.count('"centering": "folded"') == old.stdout.count('"centering": "folded"') > 0
    )
    shown = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "--center" in shown
    assert "--centre" not in shown


@pytest.mark.parametrize("function", [flashnorm.inspect, flashnorm.fold_])
def test_both_names_at_once_are_refused(function):
    with pytest.raises(TypeError, match=r"got center twice: centre is the name that it had"):
        function(model(), (X,), centre=True, center=True)


@pytest.mark.parametrize("name", ["inspect", "fold_", "fold_checkpoint"])
def test_signatures_have_the_new_names_alone(name):
    known = inspect.signature(getattr(flashnorm, name)).parameters
    assert "center" in known
    assert not known.keys() & {"centre", "eps"}


def test_an_option_that_never_was_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'eps'"):
        flashnorm.inspect(model(), (X,), eps="ignore")


def test_a_warning_of_the_fold_itself_points_here_too():
    """The one that takes old options stands between."""
    made = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).half()
    with torch.no_grad():
        made[0].weight.fill_(0.5)
        made[1].weight[0, 0] = 2.0**-14
    with pytest.warns(UserWarning, match="weights became subnormal") as found:
        flashnorm.fold_(made, (X.half(),))
    assert [warning.filename for warning in found] == [__file__]
