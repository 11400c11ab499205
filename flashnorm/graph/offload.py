"""Weights that accelerate keeps elsewhere: their parameters are on the meta device meanwhile.

accelerate wraps the forward of every module that holds parameters; the wrapper fetches them for
each call. A module is told by what the wrapper leaves on it.
"""

from __future__ import annotations

from torch import nn

HOOK, FORWARD = "_hf_hook", "_old_forward"
REMEDY = (
    "remove the hooks with accelerate.hooks.remove_hook_from_module(model, recurse=True), {}, and "
    "offload again (on disk into a new directory: accelerate reads what an old one holds)"
)


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that is not its class's.

    Where hooks were taken off again, accelerate leaves the class's forward on the module.
    """
    forward = vars(module).get("forward")
    if getattr(forward, "__self__", None) is module:
        return getattr(forward, "__func__", None) is not type(module).forward
    return forward is not None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate's hook is on a module some of whose own parameters are elsewhere."""
    return HOOK in vars(module) and any(
        held is not None and held.is_meta for held in module._parameters.values()
    )


def why_offloaded(model: nn.Module, parameter: str, then: str) -> str:
    """Why the value of a parameter is not at hand, and what to do; empty where it is there.

    then: what to do between taking the hooks off and putting them on again.
    """
    path, _, attribute = parameter.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters.get(attribute)
    if held is None or not held.is_meta:
        return ""
    if is_offloaded(module):
        return (
            f"the weights of {path or 'the model'} are offloaded by accelerate (meta device): "
            f"{REMEDY.format(then)}"
        )
    return f"{parameter} is on the meta device; load the weights before folding"
