"""A model, the same folded, and the same accelerated, on tasks of lm-evaluation-harness.

FlashNorm, arXiv 2407.09577, shows such a table of perplexities; here every task of the harness can
be a row. lm_eval is imported when an evaluation starts, and nothing else of the package needs it.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flashnorm
from flashnorm.bench.machine import describe
from flashnorm.bench.models import DTYPES
from flashnorm.checkpoint.source import read_config
from flashnorm.engines import shipped_tasks
from flashnorm.engines.evaluation_records import (
    ACCELERATED,
    AUTO,
    FOLDED,
    VARIANTS,
    Failure,
    Note,
    Result,
    Score,
    Settings,
)
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.loading import load_model, load_tokenizer
from flashnorm.marker import folded_by
from flashnorm.verification.inputs import writes_tokens

MISSING = "evaluation needs lm_eval, which is not installed ({}): pip install 'flashnorm[eval]'"
OLD = "lm_eval {} is too old, 0.4.12 is needed: pip install -U 'flashnorm[eval]'"
NETWORK = "its documents are on the network, and it could not be reached"
REACHED = re.compile(r"connect|offline|timeout|resolve", re.IGNORECASE)
ROLLING, CHOICES = "loglikelihood_rolling", "multiple_choice"
BAR = re.compile(r"(\d+)/(\d+) \[")  # how far a bar of tqdm is

Say = Callable[[str], None]


def evaluate(settings: Settings, say: Say, found: Callable[[Result], None]) -> Result:
    """Run every variant on every task; `found` is called after each with all there is until then.

    Variants: `original` is `base` as transformers runs it; `folded` is the checkpoint `folded`, or
    `base` after `fold_`; `accelerated` is `base` after `accelerate_`. All read the same tokens,
    by the tokenizer of `base`, in `dtypes`; log-probabilities are taken in float32.

    A metric of a task is lm_eval's own. Besides, for a rolling task `token_perplexity`,
    exp(−Σ log p / number of tokens), and for a multiple choice `loglikelihood`, the mean of
    log p(continuation) in nats, which moves where the chosen answers do not.

    What fails is a row of `failures`, and the rest goes on. Raises FlashNormError before a model is
    loaded where lm_eval is missing, a name is unknown, a task cannot be loaded, or `folded` is no
    folded checkpoint.
    """
    _check(settings)
    harness = _Harness(settings, say)
    tokenizer = load_tokenizer(settings.base)
    if tokenizer is None:
        raise FlashNormError(f"{settings.base} has no tokenizer, and tasks are text: put one there")
    result = Result(settings, describe() | harness.versions)
    for dtype in settings.dtypes:
        for variant in settings.variants:
            say(f"{dtype}, {variant}: loading")
            for event in _variant(harness, tokenizer, dtype, variant):
                _keep(result, event)
                found(result)
    return result


def _check(settings: Settings) -> None:
    """Raise FlashNormError for names that nobody knows, and for what is no folded checkpoint."""
    for option, names, known in (
        ("--variants", settings.variants, VARIANTS),
        ("--dtype", settings.dtypes, (AUTO, *DTYPES)),
    ):
        if not names or not set(names) <= set(known):
            what = ", ".join(name for name in names if name not in known) or "nothing"
            raise FlashNormError(f"{option} takes {', '.join(known)}, not {what}")
    if settings.include is not None and not Path(settings.include).is_dir():
        raise FlashNormError(f"--include {settings.include} is no directory of task files")
    if settings.folded is not None and folded_by(read_config(Path(settings.folded))) is None:
        raise FlashNormError(
            f"{settings.folded} is no folded checkpoint: flashnorm fold writes one, and without it "
            "the base is folded in memory"
        )


def _keep(result: Result, event: Score | Note | Failure) -> None:
    if isinstance(event, Score):
        result.scores.append(event)
    elif isinstance(event, Note):
        result.notes.append(event)
    else:
        result.failures.append(event)


def _variant(
    harness: _Harness, tokenizer: Any, dtype: str, variant: str
) -> Iterator[Score | Note | Failure]:
    """The figures of one variant, as they come."""
    try:
        model, what = _open(harness.settings, dtype, variant)
    except Exception as error:
        yield Failure(dtype, variant, "", _line(error))
        return
    before = dispatch.fallbacks()
    for task in harness.settings.tasks:
        words = f"{dtype}, {variant}: {task}"
        harness.say(words)
        try:
            figures = list(harness.run(model, tokenizer, task, words))
        except Exception as error:
            yield Failure(dtype, variant, task, _line(error))
            continue
        yield from (Score(dtype, variant, *figure) for figure in figures)
    yield Note(dtype, variant, what + _fallbacks(before))


def _open(settings: Settings, dtype: str, variant: str) -> tuple[nn.Module, str]:
    """A variant, and what it is in words. Raises FlashNormError where it would be the original."""
    given = settings.folded if variant == FOLDED else None
    source = given or settings.base
    model = load_model(source, "auto" if dtype == AUTO else DTYPES[dtype])
    if not writes_tokens(model):
        raise FlashNormError(f"{source} does not continue text: give a causal language model")
    what = "the checkpoint as it is" if given else "the model's own code"
    if variant == FOLDED and not given:
        what = _fold(model, source)
    elif variant == ACCELERATED:
        what = _accelerate(model, source)
    # Two checkpoints may be stored in two dtypes, which is a difference too.
    return model, f"{what}, in {_dtypes(model)}" if dtype == AUTO else what


def _dtypes(model: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _fold(model: nn.Module, source: str) -> str:
    flashnorm.fold_(model)
    if not (gains := flashnorm.folding(model).gains()):
        raise FlashNormError(
            f"no gain of {source} folds (it may be folded already): flashnorm inspect says why"
        )
    return f"{len(gains)} gains folded in memory"


def _accelerate(model: nn.Module, source: str) -> str:
    flashnorm.accelerate_(model)
    done = flashnorm.acceleration(model)
    if not done.fused:
        raise FlashNormError(f"no module of {source} runs on kernels: {done.kernels}")
    return f"{len(done.fused)} of {len(done.parts)} modules run on {done.kernels}"


def _fallbacks(before: dict[str, int]) -> str:
    """What ran the model's own code after all."""
    now = dispatch.fallbacks()
    new = {why: count - before.get(why, 0) for why, count in now.items()}
    return "".join(f"; {count} calls fell back ({why})" for why, count in new.items() if count)


class _Harness:
    """lm_eval with the shipped tasks, its own, and those of the settings' directory."""

    def __init__(self, settings: Settings, say: Say) -> None:
        with _quiet(say, "importing lm_eval"):
            try:
                import lm_eval
                from lm_eval.models.huggingface import HFLM
                from lm_eval.tasks import TaskManager
            except ImportError as error:
                raise FlashNormError(MISSING.format(_line(error))) from error
            if not hasattr(TaskManager, "load"):
                raise FlashNormError(OLD.format(lm_eval.__version__))
            self.tasks = _manager(TaskManager, settings)
        self.settings, self.say = settings, say
        self.simple_evaluate, self.wrap = lm_eval.simple_evaluate, HFLM
        self.versions = {"lm_eval": lm_eval.__version__, "datasets": version("datasets")}
        for task in settings.tasks:
            self._try(task)

    def _try(self, task: str) -> None:
        """Load a task, so that what is missing is said before hours of others."""
        if task not in self.tasks.all_tasks:
            near = ", ".join(difflib.get_close_matches(task, self.tasks.all_tasks))
            raise FlashNormError(
                f"lm_eval has no task {task}{near and f' (near it are {near})'}: lm_eval ls tasks "
                "lists its own, and --include takes a directory of others"
            )
        words = f"loading the documents of {task}"
        self.say(words)
        try:
            with _quiet(self.say, words):
                self.tasks.load([task])
        except Exception as error:
            why = f"{NETWORK} ({_line(error)})" if _unreached(error) else _line(error)
            raise FlashNormError(f"the task {task} cannot be loaded: {why}") from error

    def run(
        self, model: nn.Module, tokenizer: Any, task: str, words: str
    ) -> Iterator[tuple[str, str, float, int | None]]:
        """(task, metric, value, documents) of a task, or of each one in a group."""
        size = self.settings.batch_size
        with _quiet(self.say, words):
            reader = self.wrap(
                model, tokenizer=tokenizer, batch_size=size, softmax_dtype=torch.float32
            )
            found = self.simple_evaluate(
                reader,
                tasks=[task],
                task_manager=self.tasks,
                limit=self.settings.limit,
                batch_size=size,
                bootstrap_iters=0,
            )
        for name, metrics in found["results"].items():
            count = found["n-samples"].get(name, {}).get("effective")
            samples = found["samples"].get(name, [])
            kind = found["configs"].get(name, {}).get("output_type", "")
            for metric, value in {**_metrics(metrics), **_derived(kind, samples, reader)}.items():
                yield name, metric, value, count


def _manager(kind: Any, settings: Settings) -> Any:
    """The tasks that are there. lm_eval's own are read where one of them is asked for: there are
    thousands of files."""
    own = [] if settings.include is None else [settings.include]
    folders = [str(shipped_tasks.folder()), *own]
    few = kind(include_path=folders, include_defaults=False)
    return few if set(settings.tasks) <= set(few.all_tasks) else kind(include_path=folders)


def _metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """lm_eval's own figures. Its keys are "metric,filter"; the filter is named where it is one."""
    found = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            unfiltered = key.endswith(",none")
            found[metric if unfiltered else f"{metric} ({kind})"] = float(value)
    return found


def _derived(kind: str, samples: list[dict[str, Any]], reader: Any) -> dict[str, float]:
    """What the samples say beyond the metrics of a task."""
    if not samples:
        return {}
    if kind == ROLLING:
        tokens = sum(len(reader.tok_encode(sample["arguments"][0][0])) for sample in samples)
        total = math.fsum(sample["filtered_resps"][0] for sample in samples)
        return {"token_perplexity": math.exp(-total / tokens)}
    if kind == CHOICES:
        logs = [log for sample in samples for log, _ in sample["filtered_resps"]]
        return {"loglikelihood": statistics.fmean(logs)}
    return {}


class _Bars(StringIO):
    """What lm_eval writes to stderr: its bars say how far it is, the rest is not shown."""

    def __init__(self, say: Say, words: str) -> None:
        super().__init__()
        self.say, self.words = say, words

    def write(self, text: str) -> int:
        if (at := BAR.search(text)) and at[2] != "1":
            self.say(f"{self.words} | {at[1]} of {at[2]}")
        return len(text)


@contextmanager
def _quiet(say: Say, words: str) -> Iterator[None]:
    """Without lm_eval's log and bars; `say` hears of these."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(_Bars(say, words)):
            yield
    finally:
        log.setLevel(level)


def _unreached(error: BaseException) -> bool:
    """Whether a network that is not there is behind an error."""
    return any(
        isinstance(one, ConnectionError) or REACHED.search(type(one).__name__)
        for one in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if isinstance(error, FlashNormError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
