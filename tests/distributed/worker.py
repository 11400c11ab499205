"""One of two processes: trains and runs tiny models spread over both, and writes what it found.

    python -m tests.distributed.worker RANK RANKS FOLDER

FOLDER holds the meeting point and takes `RANK.json`.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import flashnorm
from flashnorm.kernels import dispatch, fallback
from flashnorm.runtime.accelerate import RECORD
from tests.training.models import batch, bounds, build, logits_of, train

DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}
MODELS = ("llama", "gpt2", "dyt")


def exact(model: nn.Module) -> nn.Module:
    """Norms that do not cast to float32 inside, so that float64 is float64."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            setattr(model.get_submodule(parent), name, norm)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    return flashnorm.accelerate_(model, batch()[:, :-1], training=True, huge_pages=False)


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for path, m in model.named_modules() if path.rpartition(".")[2].isdigit()]


def sharded(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def sharded_finely(model: nn.Module) -> nn.Module:
    """Every module with parameters of its own by itself: a reader's weight is not there when its
    norm runs, nor a norm's gain when the gradient of its reader is computed."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for module in model.modules():
        if any(holders[id(p)] == 1 for p in module._parameters.values() if p is not None):
            fully_shard(module)
    return fully_shard(model)


NORM = re.compile("RMSNorm$|LayerNorm$|DyT$")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": data_parallel,
    "FSDP2": sharded,
    "FSDP2 of every module": sharded_finely,
}


def ten_steps(rank: int, ranks: int) -> list[dict[str, Any]]:
    """Losses of the plain and of the accelerated model, each wrapped in the same way."""
    found = []
    for wrapper, wrap in WRAPPERS.items():
        for dtype_name, dtype in DTYPES.items():
            if wrap is sharded_finely and dtype != torch.float64:
                continue
            for name in MODELS:
                plain = exact(build(name, dtype))
                fused = accelerated(copy.deepcopy(plain))
                fallback._fallbacks.clear()
                models = [wrap(model) for model in (plain, fused)]
                runs = [train(model, 10, rank, ranks) for model in models]
                fallbacks = list(dispatch.fallbacks())
                with torch.no_grad():
                    after = [logits_of(model, batch()) for model in models for _ in range(2)]
                found.append(
                    {
                        "wrapper": wrapper,
                        "dtype": dtype_name,
                        "model": name,
                        "plain": runs[0].losses,
                        "fused": runs[1].losses,
                        "bounds": bounds(runs[0], dtype),
                        "after": distance(after[3], after[1]),
                        "kept": [norms_kept(model) for model in models],
                        "fallbacks": fallbacks,
                    }
                )
    return found


def norms_kept(model: nn.Module) -> int:
    """How many results of norms autograd keeps."""
    made, kept, hooks = [], [], []
    for path, module in model.named_modules():
        if path and NORM.search(type(module).__name__):
            hooks.append(module.register_forward_hook(lambda m, given, z: made.append(z)))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.untyped_storage()), t)[1], lambda t: t
    ):
        result = logits_of(model, batch())
    places = {storage.data_ptr() for storage in kept}  # FSDP has freed its parameters' by now
    result.sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(made) == 5, [type(module).__name__ for module in model.modules()]
    return sum(z.untyped_storage().data_ptr() in places for z in made)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = logits_of(model, batch())
    logits.square().mean().backward()
    names = dict(model.named_parameters())
    return logits.detach(), {
        n: full(p.grad).clone() for n, p in names.items() if p.grad is not None
    }


def distance(found: Tensor, expected: Tensor) -> float:
    return float((full(found) - expected).abs().max() / expected.abs().max())


def compared(label: str, model: nn.Module, whole: nn.Module) -> dict[str, Any]:
    """How far a spread model is from the unspread one, without a gradient and with one."""
    expected, grads = gradients(whole)
    with torch.no_grad():
        values = [distance(logits_of(model, batch()), expected) for _ in range(3)]
    logits, found = gradients(model)
    assert found.keys() == grads.keys()
    far = {name: distance(found[name], grads[name]) for name in grads}
    parts = flashnorm.acceleration(model).training if RECORD in model.__dict__ else ()
    return {
        "case": label,
        "fused": sorted({part.kind for part in parts if not part.reason}),
        "values": max(*values, distance(logits, expected)),
        "gradient": max(far.values()),
        "worst": max(far, key=far.__getitem__),
    }


def by_transformers(folder: Path) -> nn.Module:
    """Spread by the plan that the model comes with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return model.train()


def planned(model: nn.Module, mesh: Any) -> nn.Module:
    """The same plan for a model that is there already, accelerated before."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {}
    for pattern, style in model.config.base_model_tp_plan.items():
        for layer in range(model.config.num_hidden_layers):
            path = f"model.{pattern.replace('*', str(layer))}"
            plan |= {path: style, f"{path}.weight": style}
    return apply_tensor_parallelism(model, mesh, plan)


def by_torch(model: nn.Module, mesh: Any) -> nn.Module:
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            parallelize_module(module, mesh, ColwiseParallel())
        elif path.endswith(("o_proj", "down_proj")):
            parallelize_module(module, mesh, RowwiseParallel())
    return model


def tensor_parallel(rank: int, folder: Path) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (2,))
    whole = build("llama", torch.float32)
    if rank == 0:
        whole.save_pretrained(folder / "model")
    dist.barrier()
    load = lambda: by_transformers(folder / "model")  # noqa: E731
    # Where torch was built for GPUs transformers spreads over them; this is about two CPUs.
    loaded = {
        "transformers": load,
        "transformers, then accelerated": lambda: accelerated(load()),
    }
    made = (loaded if torch.version.cuda is None else {}) | {
        "accelerated, then transformers": lambda: planned(accelerated(copy.deepcopy(whole)), mesh),
        "accelerated, then torch": lambda: by_torch(accelerated(copy.deepcopy(whole)), mesh),
    }
    return [compared(label, make(), whole) for label, make in made.items()]


def functions(mesh: Any) -> list[dict[str, Any]]:
    """The operation on DTensors: weights spread over the processes, by rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from flashnorm.nn import NormGLU

    torch.manual_seed(1)
    whole = NormGLU(16, 12, gain=True, norm="layer", dtype=torch.float64)
    nn.init.normal_(whole.gain, 1, 0.3)
    x = torch.randn(3, 16, dtype=torch.float64)
    spread = copy.deepcopy(whole)
    for name, p in list(spread.named_parameters()):
        placement = Shard(0) if p.ndim == 2 else Replicate()
        setattr(spread, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    found = []
    for module, given in ((whole, x), (spread, distribute_tensor(x, mesh, [Replicate()]))):
        y = module(given)
        full(y).square().sum().backward()
        with torch.no_grad():
            again = full(module(given))
        found.append([full(y).detach(), again, *(full(p.grad) for p in module.parameters())])
    far = max(distance(a, b) for a, b in zip(found[1], found[0], strict=True))
    return [{"case": "functions", "fused": [], "values": far, "gradient": far, "worst": ""}]


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    faulthandler.enable()
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found = {
        "steps": ten_steps(rank, ranks),
        "tensor": tensor_parallel(rank, folder) + functions(init_device_mesh("cpu", (ranks,))),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
