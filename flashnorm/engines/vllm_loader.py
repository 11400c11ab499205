"""vLLM's loader of safetensors, given folded tensors: `--load-format flashnorm`.

Only vLLM imports this module. What vLLM does with a tensor (shards of tensor parallelism, fused
projections, quantization while loading) comes after the fold, so all of it stays as it is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from flashnorm.checkpoint.engine import Streamed, open_streamed
from flashnorm.engines.readers import Asked, why_not
from flashnorm.errors import FlashNormError

logger = init_logger("vllm.flashnorm")  # vLLM shows what is logged below its own name
UNTIE, KERNELS = "untie", "kernels"
ELSEWHERE = (
    "{} takes weights from beside its checkpoint, which flashnorm does not follow: fold it on disk "
    "(flashnorm fold), or load it without flashnorm"
)


class FoldingLoader(DefaultModelLoader):
    """W* = W diag(g) while loading (FlashNorm, arXiv 2407.09577), from a checkpoint as it was
    published, from one that was folded, or from one of a strict fold, which lacks its gains.

    `--model-loader-extra-config '{"untie": true}'` gives a tied head a weight of its own, so that
    the final norm folds too: it costs the memory of the head.

    Raises FlashNormError where a fold could not be told from the outside: for adapters, pooled
    hidden states and draft models that read them (`flashnorm.engines.readers`).
    """

    def __init__(self, load_config: Any) -> None:
        extra = load_config.model_loader_extra_config
        ours = copy.copy(load_config)
        ours.load_format = "safetensors"  # what the files are, which the parent asks
        self.untie = False
        self.kernels: bool | int = False  # or up to how many tokens of a step
        if isinstance(extra, dict):
            theirs = {k: v for k, v in extra.items() if k not in (UNTIE, KERNELS)}
            ours.model_loader_extra_config = theirs
            self.untie = bool(extra.get(UNTIE, False))
            self.kernels = _tokens(extra.get(KERNELS, False))
        super().__init__(ours)
        self._streamed: dict[str, Streamed] = {}

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As the parent; a head that is tied no more is said in the config before it is built."""
        streamed = self._open(model_config)
        if streamed.plan is not None and (why := why_not(asked_of(vllm_config, model_config))):
            raise FlashNormError(why)
        logger.info("flashnorm: %s: %s", streamed.path.name, streamed)
        if streamed.untied:
            _untie(model_config)
        with self._kernels(vllm_config):
            return super().load_model(vllm_config, model_config, *args, **kwargs)

    def _kernels(self, vllm_config: Any) -> AbstractContextManager[None]:
        """A context in which a model is loaded that runs on our kernels, if that was asked for."""
        if not self.kernels:
            return nullcontext()
        from flashnorm.engines import vllm_cpu, vllm_cuda

        most = None if self.kernels is True else self.kernels
        on_cpu = vllm_config.device_config.device_type == "cpu"
        reason = vllm_cpu.why_not(vllm_config) if on_cpu else vllm_cuda.why_not(vllm_config, most)
        if reason:
            logger.warning("flashnorm: vLLM's own kernels run: %s", reason)
        elif on_cpu:
            return vllm_cpu.kernels(vllm_config, most)
        elif most is not None:
            vllm_cuda.add_pass_(vllm_config, most)
        return nullcontext()

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """(name, tensor) of the checkpoint, folded."""
        self.counter_before_loading_weights = time.perf_counter()
        yield from self._open(model_config).tensors()

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """As the parent, for models all of whose weights are in their checkpoint."""
        if getattr(model, "secondary_weights", ()):
            raise FlashNormError(ELSEWHERE.format(type(model).__name__))
        super().load_weights(model, model_config)

    def _open(self, model_config: Any) -> Streamed:
        name = model_config.model
        if name not in self._streamed:
            folder = self._folder(name, model_config.revision)
            self._streamed[name] = open_streamed(folder, untie=self.untie)
        return self._streamed[name]

    def _folder(self, name: str, revision: str | None) -> Path:
        """The directory of a checkpoint; one of the hub is brought here first."""
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download

        files = ["*.safetensors", "*.safetensors.index.json", "config.json"]
        place = self.load_config.download_dir
        return Path(
            snapshot_download(name, revision=revision, cache_dir=place, allow_patterns=files)
        )


def asked_of(vllm_config: Any, model_config: Any) -> Asked:
    """What vLLM was asked to do with the model."""
    speculative = vllm_config.speculative_config
    return Asked(
        adapters=vllm_config.lora_config is not None,
        pooled=model_config.runner_type == "pooling",
        draft="" if speculative is None else str(speculative.method or "unknown"),
    )


def _untie(model_config: Any) -> None:
    """Say in the configs of a model that its head has a weight of its own."""
    for part in (model_config.hf_config, model_config.hf_text_config):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _tokens(asked: Any) -> bool | int:
    """What was asked of kernels: yes, no, or up to how many tokens of a step."""
    if isinstance(asked, bool) or (isinstance(asked, int) and asked > 0):
        return asked
    raise FlashNormError(
        f'"{KERNELS}" is {asked!r}: say true (measured at the start), false, or up to how many '
        "tokens a step runs on flashnorm's kernels"
    )
