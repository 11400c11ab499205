"""Loading whatever the user names: a directory, a GGUF file or a hub id, through transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from logging import WARNING, disable, root
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm.compat.transformers_names import knows
from flashnorm.content import BESIDE_TOKENIZER, TOKENIZER_FILES, damage
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.extras import need

if TYPE_CHECKING:
    import torch
    from torch import nn

PathName = str | os.PathLike[str]

PLACE = "pretrained_model_name_or_path"
MOST_PARTS = 100_000
_COUNT = re.compile(
    r"(?!.*(?:vocab|size|dim|token|length|position)).*(?:layer|expert|label|block_count|depth|stage)"
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(source: PathName, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The model that `source` names, in eval mode on the CPU, with its weights in `dtype`.

    source: a directory with config.json, a GGUF file or a directory that holds just one (both are
    dequantized to float32), or a hub id. `"auto"` keeps the stored dtype.

    Raises FlashNormError where nothing is there, CheckpointError where it cannot be read or where a
    tensor is missing, which transformers would fill with random numbers.
    """
    place = locate(source)
    with quiet_transformers():
        try:
            if "gguf_file" in place:
                return _load_gguf(place, dtype)
            return _load_pretrained(place, dtype)
        except FlashNormError:
            raise
        except Exception as error:
            raise CheckpointError(unreadable(source, error)) from error


def load_tokenizer(source: PathName) -> Any | None:
    """The tokenizer that lies with the model, or None where there is none.

    Raises CheckpointError where tokenizer files are there but cannot be read.
    """
    place = locate(source)
    from transformers import AutoTokenizer

    folder = Path(place["pretrained_model_name_or_path"])
    is_local = folder.is_dir()
    if is_local and "gguf_file" not in place and not _has_tokenizer(folder):
        return None
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        except Exception as error:
            if not is_local or "gguf_file" in place:
                return None
            why = damage(folder, (*TOKENIZER_FILES, *BESIDE_TOKENIZER)) or _first_line(error)
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be read ({why}): repair it, or pass tokenizer= "
                "yourself"
            ) from error


def dequantize_gguf(file: PathName, directory: PathName) -> Path:
    """Write the weights of a GGUF file as a float32 safetensors checkpoint with its tokenizer.

    Float32 holds every dequantized value exactly. The whole model is in memory meanwhile. Returns
    `directory`. Raises FlashNormError where the file is missing, CheckpointError where it cannot
    be read.
    """
    import torch

    target = Path(directory)
    model: Any = load_model(file, torch.float32)
    tokenizer = load_tokenizer(file)
    with quiet_transformers():
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    return target


def locate(source: PathName) -> dict[str, str]:
    """Where `source` is, as the arguments with which transformers' from_pretrained finds it.

    Raises FlashNormError where nothing is there, or where transformers is not installed.
    """
    need("a model that is named, not given as a torch.nn.Module,", "transformers")
    name = os.fspath(source)
    if not name:
        raise FlashNormError("no model is named: the name is empty")
    path = Path(name).expanduser()
    if path.is_file():
        return _locate_file(path)
    if path.is_dir():
        return _locate_in_directory(path)
    if is_hub_id(name):
        return {"pretrained_model_name_or_path": name}
    raise FlashNormError(
        f"{name} does not exist: give a directory with config.json and safetensors, a GGUF file, "
        "or a hub id such as organization/model"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path may be one of a model on a hub."""
    plain = not name.startswith(".") and not name.lower().endswith(".gguf")
    return plain and _HUB_ID.fullmatch(name) is not None


def _locate_file(path: Path) -> dict[str, str]:
    if path.suffix.lower() != ".gguf":
        raise FlashNormError(
            f"{path} is a file but no GGUF file: name the directory that holds it and config.json"
        )
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _locate_in_directory(path: Path) -> dict[str, str]:
    if (path / "config.json").is_file():
        return {"pretrained_model_name_or_path": str(path)}
    found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".gguf")
    if len(found) == 1:
        return _locate_file(found[0])
    what = f"{len(found)} GGUF files" if found else "no GGUF file"
    raise FlashNormError(
        f"{path} holds no config.json and {what}: name the directory of a transformers "
        "checkpoint, or the GGUF file itself"
    )


def _load_gguf(place: dict[str, str], dtype: torch.dtype | str) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    wanted = torch.float32 if dtype == "auto" else dtype
    try:
        with redirect_stderr(StringIO()):  # a progress bar that cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=wanted, trust_remote_code=False
            )
    except ImportError as error:
        raise CheckpointError(
            f"reading {place['gguf_file']} needs the packages gguf, accelerate and sentencepiece: "
            "pip install 'flashnorm[gguf]'"
        ) from error
    _forget_quantizer(model)
    return model.eval()


def _forget_quantizer(model: Any) -> None:
    """The weights are plain now: drop the marks that would stop save_pretrained and readers."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _load_pretrained(place: dict[str, str], dtype: torch.dtype | str) -> nn.Module:
    config = read_config(place)
    model, info = model_class(config).from_pretrained(
        **place,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,  # the other files are pickles
    )
    check_complete(model, info, place["pretrained_model_name_or_path"])
    return model.eval()


def model_class(config: Any) -> Any:
    """The class that the config names, else the automatic class that knows its type."""
    import transformers

    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, (list, tuple)) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found  # and nothing else of that library, whatever the config says
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if knows(auto, config):
            return auto
    return transformers.AutoModel


def read_config(place: dict[str, str]) -> Any:
    """The config of what `locate` found. Code that comes with a checkpoint is never run.

    Raises CheckpointError where it asks for more than any model has, and what transformers raises.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if "gguf_file" not in place:  # which has a check of its own
        check_counts(PreTrainedConfig.get_config_dict(**place)[0], place[PLACE])
    return AutoConfig.from_pretrained(**place, trust_remote_code=False)


def check_counts(config: Any, name: str) -> None:
    """Raise CheckpointError where a config, or one inside of it, has so many layers, experts or
    labels that lists of them alone would fill the memory."""
    if isinstance(config, (list, tuple)):
        for part in config:
            check_counts(part, name)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if _COUNT.match(str(key)) and isinstance(value, (int, float)) and value > MOST_PARTS:
            raise CheckpointError(
                f"the config of {name} sets {key} to {value}: no model has more than {MOST_PARTS}"
            )
        check_counts(value, name)


def knows_type(model_type: Any) -> bool:
    """Whether transformers has a config of this type."""
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def check_complete(model: nn.Module, info: Any, name: str) -> None:
    """Raise CheckpointError for missing tensors; a strict fold may leave out its folded gains."""
    shapes = {key: parameter.ndim for key, parameter in model.named_parameters()}
    folded = bool(getattr(model.config, "flashnorm_folded", False))
    missing = sorted(
        key for key in info["missing_keys"] if key in shapes and not (folded and shapes[key] <= 1)
    )
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors of its model, the first is {missing[0]}: "
            "transformers would fill them with random numbers; get the complete checkpoint"
        )
    if info.get("mismatched_keys"):
        raise CheckpointError(
            f"{name} holds tensors of another shape than its config.json says: "
            f"{sorted(map(str, info['mismatched_keys']))[0]}"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES)


def unreadable(source: PathName, error: Exception) -> str:
    """What is said where transformers failed to load what `source` names."""
    name = os.fspath(source)
    if not Path(name).expanduser().exists():
        return (
            f"{name} is no local path, and the hub did not give it ({_first_line(error)}): check "
            "the spelling and the network, or name a local directory or GGUF file"
        )
    return f"transformers cannot load {name}: {damage(name) or _first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings, which are as before afterwards."""
    need("this", "transformers")
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    with _quiet_imports():
        from transformers import PreTrainedModel  # noqa: F401
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        _restore_bars(bars, hub_bars)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """transformers imports quantizers where they are installed, and torchao warns when it is."""
    before = root.manager.disable
    disable(WARNING)
    try:
        yield
    finally:
        disable(before)


def _restore_bars(bars: bool, hub_bars: bool) -> None:
    """transformers switches the bars of the hub with its own, whatever these were."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    if bars:
        logging.enable_progress_bar()
    if hub_bars == hub.are_progress_bars_disabled():
        hub.enable_progress_bars() if hub_bars else hub.disable_progress_bars()
