"""One time limit for every wait: a rank that waits longer for the others names the missing one and ends.

Each rank writes to the launcher's store every few seconds that it is alive and how far it is. A collective alone cannot say
which rank is missing, and on a GPU its timeout ends the process without a message.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from polargrad_dist.errors import TrainingError

log = logging.getLogger("polargrad_dist.trainer")
SAY_EVERY = 60.0
# The places of a rank that has nothing left to do
FINISHED = 1 << 62
T = TypeVar("T")


@dataclass(frozen=True)
class Sign:
    """The last report of a rank: how many places it has passed, how often it has reported, and where it is."""

    places: int
    beats: int
    where: str


class Requests:
    """Requests to a store in a thread of their own: if the store's process is stopped, they block forever."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._last = threading.Event()
        self._last.set()
        threading.Thread(target=self._run, daemon=True, name="watch's requests").start()

    def ask(self, request: Callable[[], T]) -> T | None:
        """The answer; None if the store refuses, does not answer in time, or has not answered an earlier request."""
        if not self._last.is_set():
            return None
        answer: list[T] = []
        done = self._last = threading.Event()

        def work() -> None:
            # The store's errors derive from it
            with suppress(RuntimeError):
                answer.append(request())
            done.set()

        self._waiting.put(work)
        return answer[0] if done.wait(self.timeout) and answer else None

    def _run(self) -> None:
        while True:
            self._waiting.get()()


class Watch:
    """Watches the other ranks from a thread; ends this process when it has waited ``limit`` seconds for one of them."""

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float):
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.interval = min(5.0, limit / 20)
        self._requests = Requests(min(30.0, 2 * self.interval))
        self._lock = threading.Lock()
        self._places, self._beats, self._where, self._since = 0, 0, "the start", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._beat()
        self._thread.start()

    def at(self, where: str) -> None:
        """Records that this rank has reached a new place. Called at the same places on every rank."""
        self._places += 1
        self._where, self._since = where, time.monotonic()

    @property
    def places(self) -> int:
        return self._places

    def close(self) -> None:
        self._stop.set()
        self._thread.join(self.interval)
        self._places, self._where = FINISHED, "its end"
        self._beat()

    def tell(self, key: str) -> None:
        """Lets the ranks that wait for ``key`` go on."""
        self._ask(lambda: self.store.set(key, ""))

    def wait_for_rank_0(self, key: str, doing: str, tell: bool) -> None:
        """Returns once rank 0 has set ``key``, however long it takes, as long as rank 0 reports that it is alive.

        tell: print once a minute what this rank waits for. Raises ``TrainingError`` if rank 0 is silent for the limit.
        """
        began = said = heard = time.monotonic()
        last: Sign | None = None
        while not self._ask(lambda: self.store.check([key])):
            time.sleep(min(1.0, self.interval))
            sign, now = self._sign(0), time.monotonic()
            if sign is not None and sign != last:
                last, heard = sign, now
            if now - heard > self.limit:
                raise TrainingError(
                    f"rank 0 has given no sign of life for {now - heard:.0f} s while it was to {doing}: it was stopped, or "
                    "its machine is gone; start the run again"
                )
            self._since = now
            if tell and now - said >= SAY_EVERY:
                said = now
                _say(f"rank {self.rank} has waited {(now - began) / 60:.0f} min for rank 0 to {doing}")

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._beat()
            # The rest of the limit is for finding out which rank is missing.
            if time.monotonic() - self._since > self.limit - 8 * self.interval:
                self._judge()

    def _beat(self) -> None:
        self._beats += 1
        self._ask(lambda: self.store.set(str(self.rank), f"{self._places} {self._beats} {self._where}"))

    def _sign(self, rank: int) -> Sign | None:
        said = self._ask(lambda: self.store.get(str(rank)))
        if said is None:
            return None
        places, beats, where = said.decode().split(" ", 2)
        return Sign(int(places), int(beats), where)

    def _ask(self, request: Callable[[], T]) -> T | None:
        # For the watching thread and the one that waits for rank 0
        with self._lock:
            return self._requests.ask(request)

    def _judge(self) -> None:
        """Ends the process if another rank is silent or behind; if all are as far as this one, it is not waiting for them."""
        since, places = self._since, self._places
        before = [self._sign(rank) for rank in range(self.size)]
        for _ in range(3):
            self._stop.wait(self.interval)
            self._beat()
        after = [self._sign(rank) for rank in range(self.size)]
        if self._stop.is_set() or self._places != places or self._since != since:
            return
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = [
            rank
            for rank in others
            if (sign := after[rank]) is None or (sign == before[rank] and sign.places != FINISHED)
        ]
        behind = [
            rank for rank in others if rank not in silent and (sign := after[rank]) and sign.places < places
        ]
        if not silent and not behind:
            self._since = time.monotonic()
            return
        if all(sign is None for sign in after):
            holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            found = (
                f"{holder}, which holds the store that the ranks meet at, does not answer: stopped, or gone"
            )
        elif silent:
            found = f"{_ranks(silent)} no sign of life, last at {_places(before, silent)}: stopped, or the machine is gone"
        else:
            found = f"{_ranks(behind)} signs of life but got no further than {_places(after, behind)}"
        _say(
            f"rank {self.rank} ends: it waited {time.monotonic() - since:.0f} s at {self._where}, and {found}. No wait is "
            f"longer than trainer.strategy.timeout_minutes, {self.limit / 60:g}: look at that rank, and start the run again"
        )
        # Lets the other ranks report the same
        self._stop.wait(2 * self.interval)
        # Fails where stderr is not a real file
        with suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} gives" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))} give"


def _places(signs: list[Sign | None], ranks: list[int]) -> str:
    return ", ".join(dict.fromkeys(sign.where if (sign := signs[r]) else "the start" for r in ranks[:8]))


def _say(message: str) -> None:
    """Writes to the run's log, or before that exists to the terminal."""
    if logging.getLogger("polargrad_dist").handlers:
        log.error(message)
        return
    with suppress(OSError, ValueError, AttributeError):
        print(message, file=sys.stderr, flush=True)


def store_of_launcher(size: int, limit: float, start: str) -> dist.Store:
    """A separate connection to the store of torchrun or rank 0; requests time out well before the limit.

    start: a string that all ranks of this start share and no earlier start had: torchrun's store outlives its ranks, and its
    count of restarts differs between machines.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=size,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=max(1.0, math.ceil(limit / 20))),
    )
    return dist.PrefixStore(f"polargrad watch {start}", store)
