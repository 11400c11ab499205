"""Recording leaves a model exactly as it was, whatever its code does meanwhile."""

import functools
import threading
import types
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flashnorm
from tests.errors import relative, rounding

WIDTH = 8
EXACT = rounding(WIDTH, 4)  # no model here has more than two norms and two matrices in a row
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def randomize_(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.3 * draw if p.ndim == 1 else 0.3 * draw)
    return model


class Block(nn.Module):
    """A norm and its reader; `extra` is done in between."""

    def __init__(self, extra=lambda module, x: None, **attributes):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WIDTH)
        self.extra = extra
        for name, value in attributes.items():
            setattr(self, name, value)
        randomize_(self)

    def forward(self, x):
        h = self.norm(x)
        type(self).last = None
        self.extra(self, h)
        return self.linear(h)


def is_real(tensor):
    return type(tensor) in (torch.Tensor, nn.Parameter)


def folds(plan):
    assert [site.gain_state for site in plan.sites] == ["folded"], str(plan)


class FrozenDict(OrderedDict):
    """As some libraries have it: it can be emptied, but not filled again."""

    def __init__(self, *args):
        super().__init__(*args)
        self.frozen = True

    def _refuse(self, *_, **__):
        raise RuntimeError("frozen")

    def __setitem__(self, key, value):
        if hasattr(self, "frozen"):
            raise RuntimeError("frozen")
        super().__setitem__(key, value)

    def __setattr__(self, name, value):
        if hasattr(self, "frozen"):
            raise RuntimeError("frozen")
        super().__setattr__(name, value)

    update = setdefault = pop = _refuse


def test_field_a_config_that_cannot_be_written_back():
    config = FrozenDict({"width": WIDTH, "names": ["a", "b"]})
    model = Block(config=config)
    folds(flashnorm.inspect(model, (X,)))
    assert dict(config) == {"width": WIDTH, "names": ["a", "b"]}
    assert model.config is config
    assert all(is_real(p) for p in model.parameters())


class Merging(nn.Linear):
    """LoRA whose `train` merges into the weight, and takes out again."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.a, self.b = nn.Parameter(torch.empty(2, WIDTH)), nn.Parameter(torch.empty(WIDTH, 2))
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            with torch.no_grad():
                self.weight += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("mode", [True, False])
def test_field_train_and_eval_are_not_called(mode):
    model = randomize_(nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), Merging()).double())
    model.train(mode)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plan = flashnorm.inspect(model, (X.double(),))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[1].merged is not mode
    assert model[1].training is mode
    # While it is merged nobody reads A and B, which will be merged out again: a doubt.
    assert [site.gain_state for site in plan.sites] == ["folded" if mode else "kept"]
    y = model(X.double())
    flashnorm.fold_(model, (X.double(),))
    for flag in (mode, not mode):
        model.train(flag)
        assert relative(model(X.double()), y) <= EXACT


def test_field_a_plain_tensor_that_counts():
    def count(module, h):
        module.state += 1

    model = Block(count, state=torch.zeros(3))
    state = model.state
    folds(flashnorm.inspect(model, (X,)))
    assert model.state is state
    assert torch.equal(state, torch.zeros(3))


COUNTED, SEEN, CALLS = torch.zeros(2), [], 0
KEPT = {"inner": []}


def keep_globally(module, given, output):
    global CALLS
    CALLS += 1
    SEEN.append(output)
    KEPT["inner"].append(output)
    COUNTED.add_(1)


class Remembering(Block):
    """Writes to its class, its module and a cache by itself, as a forward may."""

    table: ClassVar[dict] = {}
    last = None

    def forward(self, x):
        global CALLS
        CALLS += 1
        SEEN.append(x)
        Remembering.last = x
        self.table[x.shape] = x
        return super().forward(x) + positions(x.shape[1])


@functools.lru_cache
def positions(length):
    return torch.arange(length).unsqueeze(-1)


def test_field_hooks_that_keep_what_they_see():
    """In a closure, on an object, in a global of the script, in a partial."""
    captured, holder = [], types.SimpleNamespace(items=[])
    model = Block()
    model.norm.register_forward_hook(lambda m, i, o: captured.append(o))
    model.norm.register_forward_hook(lambda m, i, o: holder.items.append(o))
    model.linear.register_forward_pre_hook(lambda m, i: captured.append(i))
    model.linear.register_forward_hook(keep_globally)
    model.norm.register_forward_hook(
        functools.partial(lambda into, m, i, o: into.append(o), captured)
    )
    hooks = dict(model.norm._forward_hooks)
    folds(flashnorm.inspect(model, (X,)))
    assert (captured, holder.items, SEEN, KEPT, CALLS) == ([], [], [], {"inner": []}, 0)
    assert torch.equal(COUNTED, torch.zeros(2))
    assert dict(model.norm._forward_hooks) == hooks
    with torch.no_grad():
        model(X)
    assert [is_real(t) for t in (*holder.items, *SEEN, *KEPT["inner"])] == [True] * 3
    SEEN.clear()
    KEPT["inner"].clear()
    COUNTED.zero_()
    globals()["CALLS"] = 0


def test_field_a_hook_for_one_time_is_still_there():
    model = Block()

    def once(module, given, output):
        handle.remove()
        return output * 2

    handle = model.norm.register_forward_hook(once)
    flashnorm.inspect(model, (X,))
    assert len(model.norm._forward_hooks) == 1
    with torch.no_grad():
        first, second = model(X), model(X)
    assert not torch.equal(first, second)


def test_field_what_code_keeps_outside_of_its_model():
    model = Remembering()
    folds(flashnorm.inspect(model, (X,)))
    assert (SEEN, CALLS, Remembering.table, Remembering.last) == ([], 0, {}, None)
    assert "last" not in vars(Block) or Block.last is None
    assert is_real(positions(3))
    torch.testing.assert_close(positions(3), torch.arange(3).unsqueeze(-1))


def test_field_a_thread_that_serves_the_model_meanwhile():
    """It gets real numbers, the right ones, all the time."""
    inside, done = threading.Event(), threading.Event()

    def wait(module, h):
        if not is_real(h):
            inside.set()
            done.wait(20)

    model = Block(wait)
    with torch.no_grad():
        expected = model(X)
    found = []

    def serve():
        inside.wait(20)
        with torch.no_grad():
            found.append(model(X))
        done.set()

    server = threading.Thread(target=serve)
    server.start()
    flashnorm.inspect(model, (X,))
    server.join()
    assert is_real(found[0])
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_field_a_forward_that_fails_in_the_middle(error):
    def fail(module, h):
        module.norm.weight.data = h[0, 0]
        module.linear.weight = nn.Parameter(module.linear.weight * 2)
        module.register_buffer("more", h)
        module.training = True
        module.norm.register_forward_hook(lambda *_: None)
        module.config.clear()
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        raise error("in the middle")

    model = Block(fail, config={"a": [1]})
    weights = {name: (p, p.clone(), p.data_ptr()) for name, p in model.named_parameters()}
    seed = torch.get_rng_state()
    with pytest.raises((flashnorm.TraceError, error)):
        flashnorm.inspect(model, (X,))
    for name, parameter in model.named_parameters():
        found, value, place = weights[name]
        assert parameter is found
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.get_default_dtype() == torch.float32
    assert model.config == {"a": [1]}
    assert not model.norm._forward_hooks
    assert "more" not in model._buffers


def asks_for_a_value(module, h):
    """What a fake tensor has no answer to, so that the model runs for real."""
    assert float(h.sum()) != 0.123


def test_field_a_real_run_writes_to_copies_only():
    def write(module, h):
        asks_for_a_value(module, h)
        module.linear.weight.data.mul_(2)
        module.count.add_(1)

    model = Block(write)
    model.register_buffer("count", torch.zeros(1))
    before = model.linear.weight.detach().clone()
    x = X.clone()
    flashnorm.inspect(model, (x,))
    assert torch.equal(model.linear.weight, before)
    assert float(model.count) == 0
    assert torch.equal(x, X)


class WritesElsewhere(Block):
    def forward(self, x):
        COUNTED.add_(1)
        return super().forward(x)


def test_field_a_forward_that_writes_to_what_is_not_its_own_is_refused_first():
    """A tensor that code names itself cannot be copied, and is not written to."""
    with pytest.raises(flashnorm.TraceError, match="writes to a tensor that is not its own"):
        flashnorm.inspect(WritesElsewhere(), (X,))
    assert torch.equal(COUNTED, torch.zeros(2))


def test_field_inputs_are_not_changed():
    class InPlace(Block):
        def forward(self, x, more):
            more["seen"].append(x.mul_(2))
            return super().forward(more["y"].add_(1))

    y, more = X.clone(), {"y": X.clone(), "seen": []}
    flashnorm.inspect(InPlace(), (y, more))
    assert torch.equal(y, X)
    assert torch.equal(more["y"], X)
    assert more["seen"] == []


def test_field_flags_of_the_process_are_not_touched(monkeypatch):
    """Not even for a moment: another thread would see them."""
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(n))
    monkeypatch.setattr(
        torch.backends.mha, "set_fastpath_enabled", lambda on: calls.append(("mha", on))
    )
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model = randomize_(nn.TransformerEncoder(layer, 1)).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    plan = flashnorm.inspect(model, {"src": X, "src_key_padding_mask": mask})
    assert calls == []
    assert len(plan.sites) == 2


@pytest.mark.parametrize("decorate", [torch.inference_mode(), torch.no_grad()])
def test_field_a_forward_in_inference_mode(decorate):
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WIDTH)
            self.layer, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        @decorate
        def forward(self, x):
            return self.last(self.layer(self.linear(self.norm(x)).reshape(-1, WIDTH)))

    model = randomize_(Decorated().double())
    expected = model(X.double()).clone()
    with torch.inference_mode():
        again = flashnorm.inspect(model, (X.double(),))
    plan = flashnorm.folding(flashnorm.fold_(model, (X.double(),)))
    assert [site.gain_state for site in plan.sites] == ["folded", "folded"]
    assert again == plan
    assert relative(model(X.double()).clone(), expected) <= EXACT


def test_field_weights_without_memory_are_fine():
    model = Block().to("meta")
    folds(flashnorm.inspect(model, (X,)))
