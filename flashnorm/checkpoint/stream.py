"""Writing shards: a few blocks at a time, whatever the size of the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from flashnorm.checkpoint.blocks import Block, shard_blocks
from flashnorm.checkpoint.layout import Layout, Shard
from flashnorm.checkpoint.rawio import (
    expect_sequential,
    start_writeback,
    unchanged,
    write_exact,
)
from flashnorm.checkpoint.source import Source
from flashnorm.checkpoint.twins import UNEQUAL, same_bytes, unequal_twins
from flashnorm.checkpoint.values import Values
from flashnorm.errors import CheckpointError

WORKERS = min(4, os.cpu_count() or 1)
AHEAD = 2 * WORKERS  # blocks in memory at once
WRITEBACK_BYTES = 64 << 20

Report = Callable[[int], None]
Progress = Callable[[int, int, str], None]
T = TypeVar("T")


class Meter:
    """Adds up what was done and tells it to `progress`: bytes done, bytes in total, shard name."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def of(self, name: str) -> Report:
        def report(count: int) -> None:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total, name)

        return report


def check_twins(source: Source, layout: Layout) -> None:
    """Raise CheckpointError unless tensors that the plan, or the config, takes for one weight hold
    the same bytes."""
    for new, old in layout.changes.twins:
        if not same_bytes(source, new, old):
            raise CheckpointError(UNEQUAL.format(new, old))
    if why := unequal_twins(source, layout.changes.mapped):
        raise CheckpointError(why)


def write_shard(source: Path, target: Path, shard: Shard, values: Values, report: Report) -> int:
    """Write `shard` from the file `source` to `target` and sync it; report bytes as they come.

    Returns how many elements became subnormal. Raises FoldError where the dtype overflows, and
    CheckpointError where the source changes meanwhile.
    """
    with open(source, "rb") as reader, open(target, "wb", buffering=0) as writer:
        descriptors = reader.fileno(), writer.fileno()
        expect_sequential(descriptors[0])
        write_exact(descriptors[1], memoryview(shard.header.raw), 0)
        report(len(shard.header.raw))
        lost, flushed = 0, 0

        def write(block: Block) -> int:
            return block.write(*descriptors, values)

        with unchanged(source, descriptors[0], shard.source.raw):
            for block, count in in_workers(write, shard_blocks(shard)):
                lost += count
                report(block.nbytes)
                if block.end - flushed >= WRITEBACK_BYTES:
                    start_writeback(descriptors[1], flushed, block.end - flushed)
                    flushed = block.end
        os.fsync(writer.fileno())
    return lost


def in_workers(work: Callable[[Block], T], blocks: Iterator[Block]) -> Iterator[tuple[Block, T]]:
    """Work on the blocks in threads; yields each, in order, with what `work` made of it."""
    waiting: deque[tuple[Block, Future[T]]] = deque()
    with _workers() as pool:
        for block in blocks:
            if len(waiting) == AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((block, pool.submit(work, block)))
        for block, future in waiting:
            yield block, future.result()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch on one core: blocks are the unit of parallelism here, and teams
    of threads inside of threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the setting reaches beyond the thread that makes it
