"""Jobs, one for each shard, as tasks of a Ray cluster.

The plan is made once, by the process that starts the fold; workers get it with the gains, and read
and write their shards by themselves. A shard whose worker is lost runs again elsewhere. Only the
first process gives shards their names, so that no worker that counts as lost can do harm.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, Literal, TypeVar, get_args

import flashnorm
from flashnorm.checkpoint.jobs import Job, ReportOf, Runner, run_here
from flashnorm.checkpoint.stream import WORKERS
from flashnorm.checkpoint.values import Values
from flashnorm.errors import CheckpointError, FlashNormError
from flashnorm.warning import warn

T = TypeVar("T")
Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
RETRIES = 5  # of one shard, after as many workers were lost with it
BEAT = 0.5  # seconds between two looks at the cluster
ENDING = 60.0  # seconds that tasks have to end once they are cancelled
PATIENCE = 10.0  # seconds for a cluster to answer
ALONE = 120.0  # seconds to wait for a node that can take a task, where there is none


def runner(engine: Engine, address: str | None = None) -> Runner[T]:
    """Who does the jobs. Raises ValueError for an engine that there is not."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: give one of {', '.join(ENGINES)}")
    return run_here if engine == "local" else partial(run_on_cluster, address=address)


def run_on_cluster(
    jobs: Sequence[Job[T]], values: Values, report_of: ReportOf, address: str | None = None
) -> Generator[tuple[Job[T], T], None, None]:
    """Do every job on a Ray cluster; yields them as they are done, with their results.

    `address` is the cluster's, or what RAY_ADDRESS says; without one, Ray is started on this
    machine and ended afterwards. Raises CheckpointError where Ray or the cluster is missing and
    where a shard is lost again and again; what a worker raises is raised here, with the shard.
    """
    with _connected(address) as ray:
        run: _Run[T] = _Run(ray, jobs, report_of)
        try:
            yield from run.results(values)
        finally:
            run.end()


class Tally:
    """How far every job is, and how often it was begun; an actor of the cluster."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.begun: Counter[int] = Counter()

    def begin(self, job: int) -> None:
        self.begun[job] += 1
        self.bytes[job] = 0

    def tell(self, job: int, count: int) -> None:
        self.bytes[job] = count

    def told(self) -> tuple[dict[int, int], dict[int, int]]:
        return self.bytes, dict(self.begun)


def work(number: int, job: Job[T], values: Values, tally: Any, version: str) -> T:
    """One job, in a worker."""
    if version != flashnorm.__version__:
        raise CheckpointError(
            f"a worker has flashnorm {flashnorm.__version__}, the command was started by {version}:"
            " install one version on all machines"
        )
    tally.begin.remote(number)
    return job.run(values, _teller(tally, number))


def _teller(tally: Any, job: int) -> Callable[[int], None]:
    """Tells the actor how many bytes are done, now and then."""
    done, due = 0, time.monotonic()

    def report(count: int) -> None:
        nonlocal done, due
        done += count
        if time.monotonic() >= due:
            tally.tell.remote(job, done)
            due = time.monotonic() + BEAT

    return report


class _Run(Generic[T]):
    """The jobs of one command as tasks; they are known by their numbers."""

    def __init__(self, ray: Any, jobs: Sequence[Job[T]], report_of: ReportOf) -> None:
        self.ray, self.jobs, self.report_of = ray, jobs, report_of
        self.waiting: dict[Any, int] = {}
        self.shown: Counter[int] = Counter()
        self.cpus = _cpus(ray)
        self.seen = time.monotonic()  # when a node was there that can take a task
        self.tally = ray.remote(Tally).options(num_cpus=0, **_here(ray)).remote()

    def results(self, values: Values) -> Iterator[tuple[Job[T], T]]:
        options = {"num_cpus": self.cpus, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        task = self.ray.remote(work).options(**options)
        held, version = self.ray.put(values), flashnorm.__version__
        for number, job in enumerate(self.jobs):
            self.waiting[task.remote(number, job, held, self.tally, version)] = number
        while self.waiting:
            done, _ = self.ray.wait(list(self.waiting), timeout=BEAT)
            self._look()
            for ref in done:
                number = self.waiting.pop(ref)
                job, result = self.jobs[number], self._result(ref, self.jobs[number].name)
                self._show(number, job.nbytes)
                yield job, result
        if again := sum(count > 1 for count in self._told()[1].values()):
            warn(f"{again} shards lost their worker and were done again by another one")

    def end(self) -> None:
        """Cancel what still runs, and wait for it: nothing is written afterwards."""
        refs = list(self.waiting)
        for ref in refs:
            with suppress(Exception):
                self.ray.cancel(ref)
        with suppress(Exception):
            self.ray.wait(refs, num_returns=len(refs), timeout=ENDING)
        with suppress(Exception):
            self.ray.kill(self.tally)

    def _result(self, ref: Any, name: str) -> T:
        errors = self.ray.exceptions
        try:
            result: T = self.ray.get(ref)
            return result
        except errors.RayTaskError as error:
            raise _of_shard(name, error.cause) from error
        except errors.RayError as error:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(
                f"the shard {name} was lost with its worker {RETRIES + 1} times: {why}"
            ) from error

    def _told(self) -> tuple[dict[int, int], dict[int, int]]:
        """What the actor knows; nothing while it is lost."""
        with suppress(self.ray.exceptions.RayError):
            told: tuple[dict[int, int], dict[int, int]] = self.ray.get(
                self.tally.told.remote(), timeout=ENDING
            )
            return told
        return {}, {}

    def _look(self) -> None:
        """Show what the workers did, and make sure that there are some."""
        told, _ = self._told()
        for number in self.waiting.values():
            if number in told:
                self._show(number, told[number])
        if self.ray.cluster_resources().get("CPU", 0) >= self.cpus:
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > ALONE:
            raise CheckpointError(
                f"the cluster has had no {self.cpus} processors for {ALONE:.0f} s, and none works "
                "on a shard: add a node, then run the same command to go on"
            )

    def _show(self, number: int, count: int) -> None:
        if more := count - self.shown[number]:
            self.shown[number] = count
            self.report_of(self.jobs[number].name)(more)


def _of_shard(name: str, cause: Any) -> Exception:
    """What a worker raised, with the name of its shard."""
    if isinstance(cause, FlashNormError):
        return type(cause)(f"{name}: {cause}")
    if isinstance(cause, OSError):
        return OSError(cause.errno, f"{name}: {cause.strerror or cause}")
    said = next(iter(str(cause).strip().splitlines()), "")
    return CheckpointError(f"{name}: a worker ended with {type(cause).__name__}: {said}")


def _cpus(ray: Any) -> int:
    """Processors for a task: one for each thread that writes, if every node has so many."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return int(min([WORKERS, *(count for count in nodes if count >= 1)]))


def _here(ray: Any) -> dict[str, Any]:
    """An option that puts an actor on the node of this process, if it can be there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _check_answers(address: str | None) -> None:
    """Raise CheckpointError where nobody listens at host:port, for which Ray waits long."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE):
            pass
    except (OSError, OverflowError) as error:
        raise CheckpointError(f"the Ray cluster {address} cannot be reached: {error}") from error


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected; a connection that the program has already is used, and stays."""
    try:
        import ray
    except ImportError:
        raise CheckpointError("--engine ray needs Ray: pip install 'flashnorm[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    where = address or os.environ.get("RAY_ADDRESS")
    _check_answers(where)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if where is None:
        options |= {"address": "local", "include_dashboard": False}
    try:
        ray.init(**{"address": where, **options})
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(
            f"the Ray cluster {where or 'on this machine'} cannot be reached: {said}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
