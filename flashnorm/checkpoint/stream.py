"""Reading gains and writing shards: a few blocks at a time, whatever the size of the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.blocks import Block, Gains, shard_blocks
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.layout import Layout, Shard
from flashnorm.checkpoint.rawio import (
    COPY_BYTES,
    expect_sequential,
    read_exact,
    start_writeback,
    write_exact,
)
from flashnorm.checkpoint.source import Place, Source
from flashnorm.errors import CheckpointError

WORKERS = min(4, os.cpu_count() or 1)
AHEAD = 2 * WORKERS  # blocks in memory at once
WRITEBACK_BYTES = 64 << 20

Report = Callable[[int], None]


def load_gains(source: Source, layout: Layout) -> Gains:
    """The effective gain of every folded site, as the model multiplies by it: flat, [n]."""
    return {
        gain: algebra.effective_gain(load_tensor(source, place), gain)
        for gain, place in layout.gains.items()
    }


def check_twins(source: Source, layout: Layout) -> None:
    """Raise CheckpointError unless tensors that the plan takes for one hold the same bytes."""
    for new, old in layout.twins:
        if any(a != b for a, b in zip_longest(_chunks(source, new), _chunks(source, old))):
            raise CheckpointError(
                f"the plan copies {new.entry.name} from {old.entry.name}, to which config.json "
                "ties it, but the checkpoint holds both and they differ; set "
                "tie_word_embeddings to false, or remove the one that is not meant"
            )


def write_shard(source: Path, target: Path, shard: Shard, gains: Gains, report: Report) -> int:
    """Write `shard` from the file `source` to `target` and sync it; report bytes as they come.

    Returns how many elements became subnormal. Raises FoldError where the dtype overflows.
    """
    with open(source, "rb") as reader, open(target, "wb", buffering=0) as writer:
        descriptors = reader.fileno(), writer.fileno()
        expect_sequential(descriptors[0])
        write_exact(descriptors[1], memoryview(shard.header.raw), 0)
        report(len(shard.header.raw))
        lost, flushed = 0, 0
        for block, count in _run(shard_blocks(shard), *descriptors, gains):
            lost += count
            report(block.nbytes)
            end = block.target + block.nbytes
            if end - flushed >= WRITEBACK_BYTES:
                start_writeback(descriptors[1], flushed, end - flushed)
                flushed = end
        os.fsync(writer.fileno())
    return lost


def _run(
    blocks: Iterator[Block], reader: int, writer: int, gains: Gains
) -> Iterator[tuple[Block, int]]:
    """Write the blocks in worker threads; yields each, in order, with what its write returned."""
    waiting: deque[tuple[Block, Future[int]]] = deque()
    with _workers() as pool:
        for block in blocks:
            if len(waiting) == AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((block, pool.submit(block.write, reader, writer, gains)))
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


def load_tensor(source: Source, place: Place) -> Tensor:
    """One small tensor, whole."""
    dtype = FLOAT_DTYPES[place.entry.dtype]
    data = bytearray(b"".join(_chunks(source, place)))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(place.entry.shape)


def _chunks(source: Source, place: Place) -> Iterator[bytes]:
    """The bytes of a tensor, some at a time."""
    origin = len(source.shards[place.shard].raw) + place.entry.start
    with open(source.path / place.shard, "rb") as reader:
        for done in range(0, place.entry.nbytes, COPY_BYTES):
            chunk = bytearray(min(COPY_BYTES, place.entry.nbytes - done))
            read_exact(reader.fileno(), memoryview(chunk), origin + done)
            yield bytes(chunk)
