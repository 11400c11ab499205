"""Some attacks of every kind with fixed seeds, and that what goes wrong in one is seen."""

from __future__ import annotations

import importlib.util
import time

import pytest

from flashnorm.errors import FlashNormError
from tests.attacks import run
from tests.attacks.run import ATTACKS, PROCESSOR, Tally, attack, bounded, drawn, quiet
from tests.attacks.sandbox import Sandbox
from tests.attacks.targets import QUICK
from tests.attacks.whole import WHOLE

COUNTS = {**dict.fromkeys(QUICK, 150), **dict.fromkeys(WHOLE, 8), "inspect": 3}
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the sandbox holds a file that gguf writes"
)
pytestmark = needs_gguf


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    found = Sandbox.at(tmp_path_factory.mktemp("around"))
    _ = found.good
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_comes_through(box, name):
    tally = Tally()
    with quiet():
        for seed in range(1, 1 + COUNTS[name]):
            attack(seed, name, box, tally)
    assert tally.findings == {}
    assert tally.count[name] == COUNTS[name]


def test_a_seed_is_one_attack_and_no_other():
    names = [drawn(seed, ATTACKS) for seed in range(500)]
    assert names == [drawn(seed, ATTACKS) for seed in range(500)]
    assert {*names} == {*ATTACKS}


def crash(rng, box):
    raise IndexError("tuple index out of range")


def refuse(rng, box):
    raise FlashNormError("no")


def refuse_in_no_words(rng, box):
    raise FlashNormError("\ud800")


def go_on_for_ever(rng, box):
    while True:
        pass


def wait_for_ever(rng, box):
    time.sleep(99)


def write_beside(rng, box):
    (box.around / "victims" / "new").write_text("x")


def write_over(rng, box):
    (box.around / "victim.txt").write_text("not left alone")


def leave_things(rng, box):
    (box.around / ".target.flashnorm-partial").mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (crash, "IndexError at test_attacks.py"),
        (refuse_in_no_words, "cannot be printed"),
        (go_on_for_ever, "does not end"),
        (wait_for_ever, "does not end"),
        (write_beside, "written outside: .*victims/new"),
        (write_over, "written outside: .*victim.txt"),
        (leave_things, "written outside: .*flashnorm-partial"),
    ],
)
def test_what_goes_wrong_is_found(tmp_path, monkeypatch, harm, said):
    box = Sandbox.at(tmp_path)
    monkeypatch.setattr(run, "PROCESSOR", 0.2)
    monkeypatch.setattr(run, "CLOCK", 0.2 if harm is wait_for_ever else 99)
    monkeypatch.setitem(ATTACKS, "harm", (harm, 1))
    monkeypatch.setitem(ATTACKS, "refuse", (refuse, 1))
    _ = box.good
    tally = Tally()
    attack(0, "refuse", box, tally)
    assert tally.findings == {}
    attack(1, "harm", box, tally)
    assert list(tally.findings.values()) == [[1]]
    with pytest.raises(AssertionError, match=f"harm: .*{said}"):
        raise AssertionError(str(tally.findings))


def test_no_timer_is_left():
    with bounded():
        pass
    assert run.signal.getitimer(run.signal.ITIMER_PROF) == (0.0, 0.0)
    assert PROCESSOR < run.CLOCK
