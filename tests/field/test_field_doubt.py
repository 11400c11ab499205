"""What the recorded passes did not see is a doubt: it refuses, and other inputs settle it."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import flashnorm
from flashnorm.cli import app
from tests.errors import relative
from tests.field.test_field_recording import EXACT, WIDTH, X, randomize_

X64 = X.double()


class Fork(nn.Module):
    """Two kinds of values before one linear layer; subclasses say how they are normalized."""

    def __init__(self):
        super().__init__()
        self.parts()
        self.linear = nn.Linear(WIDTH, 5)
        randomize_(self.double())

    def forward(self, x, kind=0):
        return self.linear(self.normalized(x, kind))


class Norms(Fork):
    def parts(self):
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2)])

    def normalized(self, x, kind):
        return self.norms[kind](x)


class NamedNorms(Fork):
    def parts(self):
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)

    def normalized(self, x, kind):
        return self.second(x) if kind else self.first(x)


class Bank(Fork):
    def parts(self):
        self.gains = nn.ParameterList([torch.empty(3, WIDTH)])

    def normalized(self, x, kind):
        return F.rms_norm(x, (WIDTH,), self.gains[0][kind], 1e-6)


class SlicedBank(Fork):
    def parts(self):
        self.gain = nn.Parameter(torch.empty(2 * WIDTH))

    def normalized(self, x, kind):
        return F.rms_norm(x, (WIDTH,), self.gain[kind * WIDTH : (kind + 1) * WIDTH], 1e-6)


class BiasBank(Fork):
    def parts(self):
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.biases = nn.Parameter(torch.empty(2, WIDTH))

    def normalized(self, x, kind):
        return self.norm(x) + self.biases[kind]


class Headwise(Fork):
    """A narrower gain, repeated over heads."""

    def parts(self):
        self.norm, self.heads = nn.RMSNorm(WIDTH, eps=1e-6), nn.Parameter(torch.empty(WIDTH // 2))

    def normalized(self, x, kind):
        if not kind:
            return self.norm(x)
        return F.rms_norm(x, (WIDTH,), None, 1e-6) * self.heads.repeat(2)


class BufferGain(Fork):
    def parts(self):
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.register_buffer("scales", 1 + 0.3 * torch.randn(WIDTH))

    def normalized(self, x, kind):
        return F.rms_norm(x, (WIDTH,), self.scales, 1e-6) if kind else self.norm(x)


class Rows(Fork):
    """Rows of a weight that are read for one kind only, behind another gain."""

    def parts(self):
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.more = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x, kind=0):
        half = slice(2, 5) if kind else slice(0, 2)
        h = F.rms_norm(x, (WIDTH,), self.more, 1e-6) if kind else self.norm(x)
        return F.linear(h, self.linear.weight[half])


class Half(nn.Module):
    def __init__(self, norm, linear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x):
        return self.linear(self.norm(x))


class Shared(Fork):
    """One linear layer in two modules, of which one runs; the other has no gain to be unread."""

    def parts(self):
        linear = nn.Linear(WIDTH, WIDTH)
        self.first = Half(nn.RMSNorm(WIDTH, eps=1e-6), linear)
        self.second = Half(nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False), linear)

    def forward(self, x, kind=0):
        return (self.second if kind else self.first)(x)


class SharedWeight(Shared):
    """The same weight in two linear layers."""

    def parts(self):
        super().parts()
        self.second.linear = nn.Linear(WIDTH, WIDTH)
        self.second.linear.weight = self.first.linear.weight


FORKS = [
    *(Norms, NamedNorms, Bank, SlicedBank, BiasBank, Headwise, BufferGain),
    *(Rows, Shared, SharedWeight),
]


def outputs(model):
    return [model(X64, kind).detach() for kind in (0, 1)]


@pytest.mark.parametrize("kind", FORKS)
def test_field_what_one_pass_does_not_see_refuses(kind):
    model = kind()
    expected = outputs(model)
    plan = flashnorm.folding(flashnorm.fold_(model, (X64,)))
    assert "folded" not in {site.gain_state for site in plan.sites}, str(plan)
    reasons = [site.reason for site in plan.sites if site.gain_state == "kept"]
    assert reasons
    assert all("not reach" in r or "in part" in r or "feature by" in r for r in reasons), reasons
    for found, truth in zip(outputs(model), expected, strict=True):
        assert relative(found, truth) <= EXACT


@pytest.mark.parametrize("kind", FORKS)
def test_field_several_sets_of_inputs_settle_it(kind):
    """All that is recorded counts: what differs is refused for what it is, and nothing is wrong."""
    model = kind()
    expected = outputs(model)
    plan = flashnorm.folding(flashnorm.fold_(model, [(X64,), {"x": X64, "kind": 1}]))
    assert not any("not reach" in site.reason for site in plan.sites), str(plan)
    for found, truth in zip(outputs(model), expected, strict=True):
        assert relative(found, truth) <= EXACT


class Heads(nn.Module):
    """One norm, and a reader for each kind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 3)])
        randomize_(self.double())

    def forward(self, x, kind=0):
        return self.heads[kind](self.norm(x))


def test_field_united_inputs_fold_what_each_alone_leaves_in_doubt():
    model = Heads()
    expected = outputs(model)
    for one in ((X64,), (X64, 1)):
        assert [site.gain_state for site in flashnorm.inspect(model, one).sites] == ["kept"]
    plan = flashnorm.folding(flashnorm.fold_(model, [(X64,), (X64, 1)]))
    assert [site.gain_state for site in plan.sites] == ["folded"]
    assert {c.parameter for c in plan.sites[0].consumers} == {"heads.0.weight", "heads.1.weight"}
    for found, truth in zip(outputs(model), expected, strict=True):
        assert relative(found, truth) <= EXACT


def test_field_no_set_of_inputs_is_an_error():
    with pytest.raises(flashnorm.TraceError, match="empty list"):
        flashnorm.inspect(Heads(), [])
    with pytest.raises(flashnorm.TraceError, match="could not be recorded"):
        flashnorm.inspect(Heads(), [(X64,), (X64, 7)])


def test_field_acceleration_takes_several_sets_too():
    model = Heads().float()
    with torch.no_grad():
        expected = [model(X, kind) for kind in (0, 1)]
        flashnorm.accelerate_(model, [(X,), (X, 1)])
        for kind, truth in enumerate(expected):
            torch.testing.assert_close(model(X, kind), truth)
    assert {part.path for part in flashnorm.acceleration(model).fused} >= {"heads.0", "heads.1"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A model on disk, and inputs for it as files."""
    folder = tmp_path_factory.mktemp("inputs")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    model = randomize_(transformers.LlamaForCausalLM(config))
    model.save_pretrained(folder / "model")
    save_file({"input_ids": torch.tensor([[1, 2, 3]])}, folder / "a.safetensors")
    (folder / "b.json").write_text(json.dumps([{"input_ids": [[4, 5]], "use_cache": False}]))
    return folder


def command(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_field_inputs_on_the_command_line(moe, tmp_path):
    model, files = moe / "model", ["--inputs", moe / "a.safetensors", "--inputs", moe / "b.json"]
    code, out, _ = command("inspect", model, *files, "--json")
    plan = flashnorm.Plan.from_json(json.loads(out))
    sets = [{"input_ids": torch.tensor([[1, 2, 3]])}, {"input_ids": torch.tensor([[4, 5]])}]
    assert (code, plan) == (0, flashnorm.inspect(model, sets))
    assert command("fold", model, tmp_path / "folded", *files)[0] == 0
    assert command("verify", model, tmp_path / "folded")[0] == 0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.json", None, "holds no inputs that can be read"),
        ("broken.json", "{", "holds no inputs that can be read"),
        ("numbers.json", "[1, 2]", "holds no arguments by name"),
        ("ragged.json", '{"input_ids": [[1, 2], [3]]}', "input_ids is no tensor"),
        ("not.safetensors", "x", "holds no inputs that can be read"),
        ("other.json", '{"pixels": [[1.5]]}', "could not be recorded"),
    ],
)
def test_field_inputs_that_cannot_be_used_are_named(moe, tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, error = command("inspect", moe / "model", "--inputs", tmp_path / name)
    assert code == 2
    assert says in error
