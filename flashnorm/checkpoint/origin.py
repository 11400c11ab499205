"""Where a model comes from when it is named rather than given: its config, and its gains.

Nothing here loads weights. Gains are read one by one from safetensors, on disk or on the hub.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm.checkpoint.config import quantization
from flashnorm.checkpoint.hub import Remote, open_remote, snapshot
from flashnorm.checkpoint.mapping import Mapped, map_parameters
from flashnorm.checkpoint.source import Source, open_source
from flashnorm.checkpoint.twins import why_untied
from flashnorm.checkpoint.values import Load, load_tensor, read_parameter
from flashnorm.content import damage, why_damaged
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.extras import need
from flashnorm.gguf.file import look
from flashnorm.loading import (
    check_counts,
    knows_type,
    locate,
    model_class,
    quiet_transformers,
    read_config,
)
from flashnorm.marker import folded_by
from flashnorm.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

PathName = str | os.PathLike[str]

NOT_COMPARED = (
    "config.json ties {} to {}, and the checkpoint holds both: whether they are equal is told once "
    "it is downloaded"
)


@dataclass(frozen=True)
class Origin:
    """What is known of a named model. `quantized` is the method that its stored weights are in.

    `ahead` is told which gains will be asked for, and returns what is to be said of them.
    """

    config: Any
    quantized: str | None
    notes: tuple[str, ...]
    gain: Callable[[str], Tensor | None]
    ahead: Callable[[Iterable[str]], tuple[str, ...]] = lambda names: ()

    def fake_model(self) -> nn.Module:
        """The model with fake parameters."""
        from flashnorm.graph.build import fake_model

        with quiet_transformers():
            return fake_model(model_class(self.config), self.config)


def open_origin(source: PathName, stored: Source | None = None) -> Origin:
    """Read the config that `source` names. Raises FlashNormError where there is none.

    Gains are read from `stored`, where it is given: whoever opened it compares tied weights.
    """
    need("a model that is named, not given as a torch.nn.Module,", "transformers")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _from_config_file(path)
    place = locate(source)
    if not Path(place["pretrained_model_name_or_path"]).is_dir():
        return _from_hub(place["pretrained_model_name_or_path"])
    if "gguf_file" in place:  # before transformers builds what the file asks for
        look(Path(place["pretrained_model_name_or_path"], place["gguf_file"]))
    config = _config(place, os.fspath(source))
    if stored is None:
        weights, notes = _weights(Path(place["pretrained_model_name_or_path"]), place)
    else:
        weights, notes = stored, ()
    method = None if "gguf_file" in place else quantization(config.to_dict())
    return Origin(config, method, (*_folded_note(config), *notes), _gains(weights))


def _from_hub(name: str) -> Origin:
    folder = snapshot(name)
    config = _config({"pretrained_model_name_or_path": str(folder)}, name)
    folded, method = _folded_note(config), quantization(config.to_dict())
    if method:  # no gain will be asked for
        return Origin(config, method, folded, _no_gain)
    try:
        remote = open_remote(name, folder)
    except FlashNormError as error:
        return Origin(config, None, (*folded, f"the weights were not read: {error}"), _no_gain)
    if remote.part is None:
        return Origin(config, None, (*folded, *_untied_note(folder)), _gains(remote.source))
    gain = _gains(remote.source, remote.load)
    return Origin(config, None, folded, gain, partial(_fetch, remote))


def _fetch(remote: Remote, names: Iterable[str]) -> tuple[str, ...]:
    """Fetch gains at once; what of them, and of tied weights, cannot be told."""
    try:
        mapped = map_parameters(remote.source)
        known = [mapped.provenances[name] for name in names if name in mapped.provenances]
        remote.ahead(tensor for provenance in known for tensor in provenance.tensors)
    except FlashNormError as error:
        return (f"gains were not read: {error}",)
    twins = ((name, other) for name, others in mapped.twins.items() for other in others)
    return tuple(NOT_COMPARED.format(*pair) for pair in twins)


def _from_config_file(path: Path) -> Origin:
    from transformers import CONFIG_MAPPING

    data = _read_json(path)
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if not knows_type(model_type):
        raise CheckpointError(_unknown(str(path), model_type))
    check_counts(data, str(path))
    with quiet_transformers():
        try:
            config = CONFIG_MAPPING[model_type].from_pretrained(path)
        except Exception as error:
            raise CheckpointError(f"transformers cannot read {path}: {error}") from error
    method = quantization(data)
    notes = (
        f"config.json declares weights quantized by {method}: the plan holds once they are "
        "dequantized",
    )
    return Origin(config, None, (*_folded_note(config), *(notes if method else ())), _no_gain)


def _read_json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        found = why_damaged(file)
        said = f"{file.parent}: {found}" if found else f"{file} is not valid JSON: {error}"
        raise CheckpointError(said) from error


def _unknown(name: str, model_type: Any) -> str:
    import transformers

    if model_type is None:
        return f"{name} has no model_type: it is not the config of a transformers model"
    return (
        f"{name}: transformers {transformers.__version__} does not know the model type "
        f"{model_type!r}; a newer transformers may, or pass the live model to flashnorm.inspect"
    )


def _config(place: dict[str, str], name: str) -> Any:
    file = Path(place["pretrained_model_name_or_path"]) / "config.json"
    with quiet_transformers():
        try:
            return read_config(place)
        except FlashNormError:
            raise
        except Exception as error:
            if file.is_file():
                _explain_config(file)
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            why = damage(name) or first
            raise CheckpointError(f"no config could be read from {name}: {why}") from error


def _explain_config(file: Path) -> None:
    """Raise the clearer error where the config itself is at fault."""
    data = _read_json(file)
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if not knows_type(model_type):
        raise CheckpointError(_unknown(str(file), model_type))


def _weights(path: Path, place: dict[str, str]) -> tuple[Source | None, tuple[str, ...]]:
    if "gguf_file" in place:
        return None, (_formats(path / place["gguf_file"]),)
    if not path.is_dir():
        return None, ()
    try:
        source = open_source(path)
    except FlashNormError as error:
        return None, (f"the weights were not read: {error}",)
    return source, _untied_note(path)


def _untied_note(path: Path) -> tuple[str, ...]:
    untied = why_untied(path)
    return (untied,) if untied else ()


def _formats(file: Path) -> str:
    """In what the tensors of a GGUF file are stored."""
    try:
        count = Counter(stored.type for stored in look(file).tensors)
    except FlashNormError as error:
        return f"the weights were not read: {error}"
    said = ", ".join(f"{number} in {name}" for name, number in count.most_common())
    return f"{count.total()} tensors are stored as a GGUF file has them: {said}"


def _gains(source: Source | None, load: Load = load_tensor) -> Callable[[str], Tensor | None]:
    if source is None:
        return _no_gain

    @cache
    def mapped() -> Mapped:
        return map_parameters(source)

    def gain(name: str) -> Tensor | None:
        try:
            return read_parameter(source, mapped()[name], load)
        except FlashNormError:
            return None

    return gain


def _no_gain(name: str) -> None:
    return None


def _folded_note(config: Any) -> tuple[str, ...]:
    key = folded_by(config.to_dict())
    return (f"folded before, as {key} in its config says",) if key else ()
