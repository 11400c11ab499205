"""Shrink any configuration class by the meaning of its field names.

A rule maps a field name to a tiny value. Lists with one entry per layer are cut down to the first
layer of every kind, so that each kind of layer stays. Sub-configurations are shrunk the same way.
`OVERRIDES` holds the few values that a rule cannot know.
"""

import copy
import dataclasses
import re

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from .overrides import OVERRIDES, STAND_INS, SUBSTITUTES
from .rules import (
    DEPTHS,
    FURTHER,
    FURTHER_MISSING,
    LAYER_COUNTS,
    LAYERS,
    MISSING,
    RULES,
    STAGES,
    VOCAB,
    Rules,
)

FIRST_SPECIAL = VOCAB - 20  # special tokens live from here on, text below


def shrink_value(name: str, value: int, base: dict, rules: Rules = RULES) -> int:
    """The tiny value of an integer field; `base` holds the defaults of all fields of its class."""
    for rule, *patterns in rules:
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return rule(value, base)
    return value


def tiny_config(model_type: str, **changes) -> PretrainedConfig:
    """The tiny configuration that the causal-LM class of `model_type` takes, with `changes`.

    Where that class takes a part of the registered configuration (a text decoder inside a larger
    model), the part.
    """
    config = shrink(CONFIG_MAPPING[model_type], model_type, changes)
    wanted = causal_lm_class(model_type).config_class
    if isinstance(config, wanted):
        return config
    for name in type(config).sub_configs:
        if isinstance(getattr(config, name), wanted):
            return getattr(config, name)
    return config


def causal_lm_class(model_type: str) -> type:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return getattr(transformers, NAMES[model_type])


@dataclasses.dataclass(frozen=True)
class Level:
    """How much is shrunk: numbers and lists of numbers, each by rules of their own."""

    name: str
    numbers: Rules
    lists: Rules
    missing: dict = dataclasses.field(default_factory=lambda: FURTHER_MISSING)
    causal: bool = False


CAUSAL = Level("causal", RULES, [], missing=MISSING, causal=True)
# From the smallest to one that leaves all widths: the first at which a model runs is taken.
LEVELS = (
    Level("small", FURTHER, STAGES),
    Level("narrow", FURTHER, DEPTHS),
    Level("shallow", DEPTHS, DEPTHS),
    Level("as it is", [], []),
)


def shrink(
    cls: type, path: str, changes: dict | None = None, level: Level = CAUSAL, like=None
) -> PretrainedConfig:
    """A tiny instance of the configuration class `cls`; `path` is its model type, then its part.

    `like` is the instance that a composite has by default, where that is not the class's own.
    """
    base, own = _defaults(cls)
    given: dict = {}
    if like is not None and not level.causal:
        usual, base = base, base | vars(like)
        given = {k: v for k, v in vars(like).items() if k in own and v != usual.get(k)}
        own |= given
    kwargs = {k: v for k, v in given.items() if k not in cls.sub_configs}
    kwargs |= {k: shrink_value(k, v, base, level.numbers) for k, v in own.items() if _is_int(v)}
    kwargs |= _shrunk_lists(base, own, level.lists)
    kwargs |= {k: v for k, v in level.missing.items() if k in own and base[k] is None}
    if level.numbers:
        kwargs |= _per_layer(base, own)
        kwargs |= _small_token_ids(base)
    if level.causal and "is_decoder" in own and path in CONFIG_MAPPING:
        kwargs["is_decoder"] = True
    overrides = copy.deepcopy(_overrides(cls, path, level) | (changes or {}))
    kwargs |= overrides
    _fit_lists(kwargs, overrides)
    for name in cls.sub_configs:
        if name in kwargs:
            continue
        if (part := _part_class(cls, name, base.get(name))) in STAND_INS:
            kwargs[name] = STAND_INS[part](base.get(name))
        elif part:
            default = base.get(name) if isinstance(base.get(name), part) else None
            kwargs[name] = shrink(part, f"{path}.{name}", level=level, like=default)
    if not level.causal:
        kwargs |= _rope_sections(cls, kwargs, base)
        kwargs |= _backbone_outputs(kwargs, base)
    config = cls(**kwargs)
    vars(config).update(SUBSTITUTES.get(path, {}))
    return config


def _overrides(cls: type, path: str, level: Level) -> dict:
    """What the path says; a part of a further type also takes what its own type says."""
    own = {} if level.causal else OVERRIDES.get(cls.model_type, {})
    return own | OVERRIDES.get(path, {})


def _backbone_outputs(kwargs: dict, base: dict) -> dict:
    """A backbone keeps the number of its outputs: those of its stages, or a layer for each."""
    indices = base.get("_out_indices")
    if not indices:
        return {}
    stages = next((kwargs[n] for n in ("depths", "hidden_sizes") if kwargs.get(n)), None)
    if stages is not None:
        return {"out_indices": list(indices)} if max(indices) <= len(stages) else {}
    count = next((n for n in LAYER_COUNTS if n in kwargs), None)
    layers = max(len(indices), LAYERS)
    first = layers - len(indices) + 1
    return {count: layers, "out_indices": list(range(first, layers + 1))} if count else {}


def _rope_sections(cls: type, kwargs: dict, base: dict) -> dict:
    """Sections of a rotary embedding over several axes: as many channels as the tiny head has."""
    rope, heads = base.get("rope_parameters") or {}, base.get("num_attention_heads")
    sections = rope.get("mrope_section")
    if not sections and "mrope_section" in (cls.ignore_keys_at_rope_validation or ()):
        rope, sections = {"rope_type": "default", "rope_theta": 1e4, **rope}, [16, 24, 24]
    if not sections or not heads or "rope_parameters" in kwargs:
        return {}

    def head_dim(of: dict) -> int:
        return of.get("head_dim") or of["hidden_size"] // of["num_attention_heads"]

    total = sum(sections) * head_dim(base | kwargs) // head_dim(base)
    tiny = [total * part // sum(sections) for part in sections]
    tiny[-1] += total - sum(tiny)
    return {"rope_parameters": {**rope, "mrope_section": tiny}}


def _shrunk_lists(base: dict, own: dict, rules: Rules) -> dict:
    """Lists of numbers, one per stage: each as a number of that name."""
    return {
        name: type(value)(shrink_value(name.removesuffix("s"), v, base, rules) for v in value)
        for name, value in own.items()
        if isinstance(value, (list, tuple)) and value and all(map(_is_int, value))
    }


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _defaults(cls: type) -> tuple[dict, dict]:
    """Values of the default instance (`base`) and defaults of the fields alone (`own`)."""
    own = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    own = {k: v for k, v in own.items() if v is not dataclasses.MISSING}
    try:
        base = own | vars(cls()) | {"per_layer_config": cls().to_dict().get("per_layer_config")}
    except Exception:  # the default instance of a composite may not pass its own checks
        base = own
    return base, own


def _part_class(cls: type, name: str, default) -> type | None:
    """The class of a sub-configuration: that of the default instance, else the declared one."""
    if isinstance(default, PretrainedConfig):
        return type(default)
    spec = cls.sub_configs_defaults.get(name)
    if spec is None:
        return cls.sub_configs[name]
    if spec.optional:
        return None
    return type(spec.default_config)


def _per_layer(base: dict, own: dict) -> dict:
    """Cut lists with one entry per layer to the first layer of each kind, to `LAYERS` at least."""
    count_name = next((n for n in LAYER_COUNTS if n in own), None)
    if count_name is None or not _is_int(count := base.get(count_name)):
        return {}
    lists = {k: v for k, v in base.items() if k in own and _describes_layers(v, count)}
    extra = {int(k): v for k, v in (base.get("per_layer_config") or {}).items()}
    if not lists and not extra:
        return {}
    kinds = [
        (*(str(v[i]) for v in lists.values()), *sorted(extra.get(i, {}))) for i in range(count)
    ]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    tiny = {k: [_shrink_entry(k, v[i], base) for i in chosen] for k, v in lists.items()}
    tiny[count_name] = len(chosen)
    if extra:
        tiny["per_layer_config"] = {
            j: {k: _ratio(k, v, base) for k, v in extra[i].items()}
            for j, i in enumerate(chosen)
            if i in extra
        }
    return tiny


def _describes_layers(value, count: int) -> bool:
    """A list with one entry per layer; a list of the layers' indices is none."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return False
    return list(value) != list(range(count))


def _shrink_entry(name, value, base):
    singular = name.removesuffix("_per_layer")
    return shrink_value(singular, value, base) if _is_int(value) and value > 1 else copy.copy(value)


def _ratio(name, value, base):
    """The tiny value of a per-layer override: its ratio to the global value is the default one."""
    usual = base.get(name)
    if not (_is_int(value) and _is_int(usual)):
        return shrink_value(name, value, base) if _is_int(value) else value
    return max(2, shrink_value(name, usual, base) * value // usual)


def _fit_lists(kwargs: dict, overrides: dict) -> None:
    """Where an override sets the layers, let the count and the other per-layer lists follow it."""
    lists = [v for k, v in overrides.items() if k in ("layer_types", "layers_block_type")]
    if not lists:
        return
    count = len(lists[0])
    for name in kwargs.keys() - overrides.keys():
        if name in LAYER_COUNTS:
            kwargs[name] = count
        elif isinstance(kwargs[name], list) and len(kwargs[name]) < count and "token" not in name:
            kwargs[name] = kwargs[name] + [kwargs[name][-1]] * (count - len(kwargs[name]))


def _small_token_ids(base: dict) -> dict:
    """Give each special token beyond the tiny vocabulary a place of its own at the end of it."""
    ids, free = {}, VOCAB - 1
    for name, value in base.items():
        if not re.fullmatch(r".*_token_(id|index)", name):
            continue
        if isinstance(value, (list, tuple)) or (_is_int(value) and value >= FIRST_SPECIAL):
            ids[name] = [free] if isinstance(value, (list, tuple)) else free
            free -= 1
    return ids
