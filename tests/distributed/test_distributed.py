"""Training and tensor parallelism on two processes (gloo, CPU): the same as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashnorm.kernels import dispatch
from flashnorm.verification.bounds import Size, output_bound
from tests.distributed.worker import DTYPES, MODELS, WRAPPERS
from tests.training.models import DEPTH, FFN, bounds, build, train

RANKS = 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    running = []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        command = [sys.executable, "-m", "tests.distributed.worker", str(rank), str(RANKS), folder]
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * RANKS, "\n".join(said)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def of(found, **wanted):
    """The row of each process that has these entries, if there is one."""
    return [row for one in found for row in one["steps"] if wanted.items() <= row.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_ten_steps_have_the_losses_of_the_model_itself(found, wrapper, dtype, model):
    rows = of(found, wrapper=wrapper, dtype=dtype, model=model)
    assert len(rows) == RANKS or wrapper == "FSDP2 of every module"
    for row in rows:
        pairs = zip(row["fused"], row["plain"], row["bounds"], strict=True)
        assert all(abs(ours - theirs) <= limit for ours, theirs, limit in pairs)
        # float64 is not for the kernels, which a first call in training does not mind.
        assert dispatch.GRADIENT not in row["fallbacks"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_no_normalized_rows_are_kept(found, wrapper, model):
    for row in of(found, wrapper=wrapper, dtype="float64", model=model):
        assert row["kept"] == [5, 0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_it_is_what_one_process_computes(found, wrapper, model):
    """The mean of both processes' losses is the loss of one process on the whole batch."""
    from tests.distributed.worker import exact

    alone = train(exact(build(model, torch.float64)))
    rows = of(found, wrapper=wrapper, dtype="float64", model=model)
    for one, other, whole, limit in zip(
        rows[0]["fused"], rows[1]["fused"], alone.losses, bounds(alone, torch.float64), strict=True
    ):
        assert abs((one + other) / 2 - whole) <= limit


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_without_a_gradient_it_is_the_same_as_well(found, wrapper, model):
    """After ten steps, whose own differences `bounds` has: a loss is off by twice its logits."""
    for row in of(found, wrapper=wrapper, dtype="float64", model=model):
        assert row["after"] <= row["bounds"][-1]


# What is found to save less in training. transformers replaces the forwards of what it spreads.
ALL = ["gated", "linear", "norm"]
CASES = {
    "transformers": [],
    "transformers, then accelerated": [],
    "accelerated, then transformers": ALL,
    "accelerated, then torch": ALL,
    "functions": [],
}


@pytest.mark.parametrize("case", CASES)
def test_spread_over_two_processes_it_equals_the_whole_model(found, case):
    limit = output_bound(Size(FFN, 2 * DEPTH, torch.float32), torch.float32)
    for one in found:
        rows = [row for row in one["tensor"] if row["case"] == case]
        if not rows and torch.version.cuda is not None:
            pytest.skip("transformers would spread over GPUs")
        (row,) = rows
        assert row["fused"] == CASES[case]
        assert row["values"] <= limit
        assert row["gradient"] <= limit, row["worst"]
