"""Private names of transformers, and its modules that are no public interface, behind functions.

Whoever calls one has a model or a config from transformers, so it is there to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

from flashnorm.compat import TRANSFORMERS, Private

# Building a model.


def no_init_weights() -> AbstractContextManager[Any]:
    """A context in which a model that is built leaves its parameters as they were made."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def builder(model_class: Any) -> Callable[..., Any]:
    """What builds a model of a class, or of an auto class, from a config."""
    if auto := getattr(model_class, "from_config", None):
        return partial(auto, trust_remote_code=False)
    return model_class._from_config


def knows(auto: Any, config: Any) -> bool:
    """Whether an auto class has a model for a config."""
    return type(config) in auto._model_mapping


def built_class(model_class: Any, config: Any) -> Any:
    """The class that an auto class builds from a config; another class is its own."""
    return getattr(model_class, "_model_mapping", {}).get(type(config), model_class)


def initializer(model: Any) -> Callable[[Any], object] | None:
    """What gives the parameters of a module their first values; None where the model has none."""
    return getattr(model, "_init_weights", None)


def name_or_path(config: Any) -> str:
    """Where a config was loaded from; may be empty."""
    return getattr(config, "_name_or_path", "")


# Loading a checkpoint.


def conversion_rules(model: Any) -> list[Any]:
    """How the tensors of checkpoints become the parameters of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def load_state(model: Any, state: dict[str, Any], rules: list[Any]) -> Any:
    """Load tensors into a model; what could not be loaded: `conversion_errors` and others."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(weight_mapping=rules)
    return convert_and_load_state_dict_in_model(model, state, settings)[0]


def router(model: Any, rules: list[Any]) -> Callable[[str], tuple[str, bool]]:
    """The parameter that a tensor of a checkpoint is loaded as, and whether a rule computes it."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = deepcopy(rules)  # some count how often they were asked
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def route(key: str) -> tuple[str, bool]:
        found, pattern = rename_source_key(key, renamings, converters, prefix, state)
        return found, pattern is not None

    return route


def namer(model: Any, rules: list[Any]) -> Callable[[str], str]:
    """What says which parameter of the model a tensor of a checkpoint is loaded as."""
    route = router(model, rules)
    return lambda key: route(key)[0]


def dtypes(model: Any, dtype: Any) -> Callable[[str], Any]:
    """In which dtype each tensor is loaded, by its name: some of a model stay in float32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: dtype
    pattern, kinds, _ = build_glob_alternation(list(plan))

    def of(name: str) -> Any:
        found = pattern.search(name)
        return plan[kinds[found.lastgroup]] if found else dtype

    return of


# Attention.


def attention_of(config: Any) -> str:
    """The name of the attention that a config asks for."""
    return config._attn_implementation


def can_replace_attention(model: Any) -> bool:
    """Whether a model looks its attention up by name, sdpa's among others."""
    declared = model._supports_sdpa and model._supports_attention_backend
    return bool(declared and model._can_set_attn_implementation())


def attention_function(name: str) -> Callable[..., Any]:
    """The attention that a name stands for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def sdpa_mask() -> Callable[..., Any]:
    """What makes the masks that sdpa is given."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask


# Experts.


def experts_of(config: Any) -> str | None:
    """The name of the implementation of experts that a config asks for; None in old versions."""
    return getattr(config, "_experts_implementation", None)


def set_experts_(config: Any, name: str) -> None:
    """Let this config ask for an implementation of experts, and none of those inside."""
    config._experts_implementation = {"": name}


def experts_function(name: str) -> Callable[..., Any]:
    """The implementation of experts that a name stands for."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[name]


def register_experts(name: str, function: Callable[..., Any]) -> None:
    """Let a name stand for an implementation of experts."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, function)


class ExpertWeights(NamedTuple):
    """What an implementation of experts reads: [E, k, n] each, views where held as [E, n, k].

    first gives gate and up, which `gate` makes one, second what is behind them; biases: [E, k].
    """

    first: Any
    first_bias: Any
    second: Any
    second_bias: Any
    gate: Callable[[Any], Any]


_EXPERTS = ("has_gate", "has_bias", "is_transposed", "config", "_apply_gate")


def has_experts(module: Any) -> bool:
    """Whether a module looks its implementation of experts up by the name in its config."""
    return all(hasattr(module, name) for name in _EXPERTS)


def expert_weights(module: Any) -> ExpertWeights | str:
    """The weights of a module that `has_experts`, or why it is of another kind."""
    if not module.has_gate:
        return "its experts have no gate"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are shared between several processes"
    try:
        first, second, biases = module.gate_up_proj, module.down_proj, (None, None)
        if module.has_bias:
            biases = (module.gate_up_proj_bias, module.down_proj_bias)
    except AttributeError:
        return "the weights of its experts have other names"
    if module.is_transposed:
        first, second = (w.transpose(1, 2) if w.dim() == 3 else w for w in (first, second))
    return ExpertWeights(first, biases[0], second, biases[1], module._apply_gate)


# Caches.


def growing_layer() -> type[Any]:
    """The class of a cache's layers that grow by concatenation: `keys`, `values`."""
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer


def fixed_layer() -> type[Any]:
    """The same of a fixed length: `keys`, `values`, and `cumulative_length`, how much is in use."""
    from transformers.cache_utils import StaticLayer

    return StaticLayer


def window_layer() -> type[Any]:
    """A fixed layer that keeps the last positions, and counts on the host as `WINDOW_COUNT`."""
    from transformers.cache_utils import StaticSlidingWindowLayer

    return StaticSlidingWindowLayer


WINDOW_COUNT = "cumulative_length_int"


# Continuous batching and compiled steps.


def batching() -> Any | None:
    """The class whose `init_continuous_batching` begins it; None in a version without."""
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
    except ImportError:
        return None
    return ContinuousMixin if hasattr(ContinuousMixin, "init_continuous_batching") else None


def give_back_(manager: Any, attention: str) -> None:
    """Name the attention that a model has again once its batching manager stops."""
    manager._original_attn_impl = attention


def compile_everywhere_(config: Any) -> None:
    """Let `generate` compile its steps on a CPU too, as this CompileConfig says."""
    config._compile_all_devices = True


def _private(theirs: str, ours: str, use: str) -> Private:
    return Private(f"transformers.{theirs}", ours, use, TRANSFORMERS)


_BATCHING = "generation.continuous_batching.continuous_api"

NAMES = (
    _private("initialization.no_init_weights", "no_init_weights", "initializers do nothing"),
    _private("PreTrainedModel._from_config", "builder", "from_config of a class that is not auto"),
    _private("AutoModelForCausalLM._model_mapping", "knows", "which config classes it has"),
    _private("PreTrainedModel._init_weights", "initializer", "the first values of one module"),
    _private("PreTrainedConfig._name_or_path", "name_or_path", "where it was loaded from"),
    _private(
        "conversion_mapping.get_model_conversion_mapping",
        "conversion_rules",
        "the rules of one model, for any checkpoint of it",
    ),
    _private(
        "core_model_loading.convert_and_load_state_dict_in_model",
        "load_state",
        "loads tensors of any kind, and says what went wrong",
    ),
    _private("modeling_utils.LoadStateDictConfig", "load_state", "is given the rules alone"),
    _private("core_model_loading.WeightConverter", "router", "a rule that computes"),
    _private("core_model_loading.WeightRenaming", "router", "a rule that only renames"),
    _private(
        "core_model_loading.rename_source_key",
        "router",
        "the parameter, and the pattern of the rule that computes",
    ),
    _private(
        "core_model_loading.build_glob_alternation",
        "dtypes",
        "a pattern, and which of those that it is made of a group stands for",
    ),
    _private(
        "PreTrainedModel._get_dtype_plan", "dtypes", "dtypes by parts of names, where not the same"
    ),
    _private(
        "PreTrainedConfig._attn_implementation",
        "attention_of",
        "what set_attn_implementation sets, in the configs inside as well",
    ),
    _private("PreTrainedModel._supports_sdpa", "can_replace_attention", "true of Llama"),
    _private(
        "PreTrainedModel._supports_attention_backend",
        "can_replace_attention",
        "true of models that look their attention up by name",
    ),
    _private(
        "PreTrainedModel._can_set_attn_implementation",
        "can_replace_attention",
        "false where the code of a model was written before",
    ),
    _private(
        "modeling_utils.ALL_ATTENTION_FUNCTIONS",
        "attention_function",
        "has what AttentionInterface.register is given",
    ),
    _private(
        "PreTrainedConfig._experts_implementation",
        "experts_of",
        "experts look it up at every call; a dict with an empty name is for this config alone",
    ),
    _private(
        "integrations.moe.ALL_EXPERTS_FUNCTIONS",
        "experts_function",
        "has what ExpertsInterface.register is given, grouped_mm and batched_mm",
    ),
    _private("integrations.moe.ExpertsInterface", "register_experts", "registers for all models"),
    _private(
        "integrations.moe.use_experts_implementation._apply_gate",
        "has_experts",
        "gate and up of all experts in, what the second product reads out",
    ),
    _private(
        "integrations.moe.use_experts_implementation._is_expert_parallel",
        "expert_weights",
        "false in one process",
    ),
    _private("masking_utils.sdpa_mask", "sdpa_mask", "can be registered under another name"),
    _private(
        "cache_utils.DynamicLayer",
        "growing_layer",
        "keys and values [B, H, length, D], which the next token is concatenated to",
    ),
    _private(
        "cache_utils.StaticLayer",
        "fixed_layer",
        "written in place at cumulative_length, a tensor that counts on",
    ),
    _private(
        "cache_utils.StaticSlidingWindowLayer",
        "window_layer",
        "its count on the host chooses by whether the window is full, and by nothing else of it",
    ),
    _private(
        f"{_BATCHING}.ContinuousMixin",
        "batching",
        "its init_continuous_batching returns the manager",
    ),
    _private(
        f"{_BATCHING}.ContinuousBatchingManager._original_attn_impl",
        "give_back_",
        "what the model is given when the manager stops",
    ),
    _private(
        "CompileConfig._compile_all_devices",
        "compile_everywhere_",
        "generate then asks for no accelerator",
    ),
)
