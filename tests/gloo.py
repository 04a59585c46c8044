"""Runs a function on n real processes joined by gloo, and returns what each rank returned.

A fork server that has torch loaded already makes one run cost a fraction of a second instead of an import per rank.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# Seconds that the other ranks have to say what happened to them, once one has failed
GRACE = 3.0

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    store: str,
    timeout: float,
    args: bytes,
    out: Any,
    all_done: Any,
) -> None:
    import torch
    import torch.distributed as dist

    # A rank that is ended by a signal says where it was
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        # pickled here: by the queue, tensors would travel as handles to this process's memory, which ends with it
        out.put((rank, True, pickle.dumps(fn(rank, world, *pickle.loads(args)))))
        # A rank that closes its connections early could be taken for a dead one
        all_done.wait(timeout)
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls ``fn(rank, world, *args)`` on ``world`` gloo ranks; returns the results in rank order.

    ``fn`` and its results must pickle (return Python numbers, NumPy arrays or CPU tensors). An exception on any rank
    fails the call with the tracebacks of all ranks that raised, in the order they arrived: the first may be that of
    a rank whose peer was gone. A run that outlasts ``timeout`` seconds is killed and fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = _context.Queue()
        all_done = _context.Event()
        store = os.path.join(folder, "store")
        ranks = [
            _context.Process(
                target=_rank_main,
                args=(fn, r, world, store, timeout, pickle.dumps(args), out, all_done),
                daemon=True,
            )
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) + len(failures) < world:
                try:
                    rank, ok, value = out.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
                except queue.Empty:
                    if failures and time.monotonic() > deadline:
                        break
                    silent = [r for r in range(world) if r not in results and r not in failures]
                    dead = [r for r in silent if ranks[r].exitcode not in (None, 0)]
                    if dead:
                        raise AssertionError(
                            f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}"
                        ) from None
                    if time.monotonic() > deadline:
                        missing = sorted(set(range(world)) - set(results))
                        raise AssertionError(f"ranks {missing} did not finish in {timeout} s") from None
                    continue
                if ok:
                    results[rank] = pickle.loads(value)
                    continue
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE)
            if failures:
                raise AssertionError(
                    "\n".join(f"rank {r} of {world} failed:\n{t}" for r, t in failures.items())
                )
        finally:
            all_done.set()
            for process in ranks:
                process.join(5 if len(results) == world else 0.1)
                if process.is_alive():
                    process.kill()
        return [results[r] for r in range(world)]
