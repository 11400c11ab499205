"""Writing shards: a few blocks at a time, whatever the size of the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from flashnorm.checkpoint.blocks import Block, shard_blocks
from flashnorm.checkpoint.layout import Layout, Shard
from flashnorm.checkpoint.rawio import (
    expect_sequential,
    start_writeback,
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

    Returns how many elements became subnormal. Raises FoldError where the dtype overflows.
    """
    with open(source, "rb") as reader, open(target, "wb", buffering=0) as writer:
        descriptors = reader.fileno(), writer.fileno()
        expect_sequential(descriptors[0])
        write_exact(descriptors[1], memoryview(shard.header.raw), 0)
        report(len(shard.header.raw))
        lost, flushed = 0, 0
        for block, count in _run(shard_blocks(shard), *descriptors, values):
            lost += count
            report(block.nbytes)
            if block.end - flushed >= WRITEBACK_BYTES:
                start_writeback(descriptors[1], flushed, block.end - flushed)
                flushed = block.end
        os.fsync(writer.fileno())
    return lost


def _run(
    blocks: Iterator[Block], reader: int, writer: int, values: Values
) -> Iterator[tuple[Block, int]]:
    """Write the blocks in worker threads; yields each, in order, with what its write returned."""
    waiting: deque[tuple[Block, Future[int]]] = deque()
    with _workers() as pool:
        for block in blocks:
            if len(waiting) == AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((block, pool.submit(block.write, reader, writer, values)))
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
