"""One limit for every wait: a rank that waits for the others longer than it says which of them it waits for, and ends.

Each rank tells the launcher's store every few seconds that it is alive and how far it has come. A collective alone could
not say who is missing, and on a GPU would end the process without a word.
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
FINISHED = 1 << 62  # the places of a rank that has nothing left to do
T = TypeVar("T")


@dataclass(frozen=True)
class Sign:
    """What a rank last said: how many places it has passed, how often it has said so, and where it is."""

    places: int
    beats: int
    where: str


class Requests:
    """Requests to a store from a thread of their own: where the store's process is stopped they would block for ever."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._last = threading.Event()
        self._last.set()
        threading.Thread(target=self._run, daemon=True, name="watch's requests").start()

    def ask(self, request: Callable[[], T]) -> T | None:
        """The answer; None where the store refuses, gives none in time, or still owes one."""
        if not self._last.is_set():
            return None
        answer: list[T] = []
        done = self._last = threading.Event()

        def work() -> None:
            with suppress(RuntimeError):  # the store's errors derive from it
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
        """This rank begins something new. Called at the same places on every rank."""
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
        """Ends the waiting of the others for ``key``."""
        self._ask(lambda: self.store.set(key, ""))

    def wait_for_rank_0(self, key: str, doing: str, tell: bool) -> None:
        """Returns once rank 0 has told ``key``, however long it takes, as long as rank 0 gives signs of life.

        tell: say once a minute what is being waited for. Raises ``TrainingError`` when rank 0 has been silent for the limit.
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
            # The rest of the limit goes to finding out who is missing.
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
        with self._lock:  # the watching thread and one that waits for rank 0
            return self._requests.ask(request)

    def _judge(self) -> None:
        """Ends the process where another rank is silent or behind; where all are as far as this one, none is waited for."""
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
        self._stop.wait(2 * self.interval)  # for the other ranks to say the same
        with suppress(OSError, ValueError, AttributeError):  # a stderr that is no file has no place for it
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} gives" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))} give"


def _places(signs: list[Sign | None], ranks: list[int]) -> str:
    return ", ".join(dict.fromkeys(sign.where if (sign := signs[r]) else "the start" for r in ranks[:8]))


def _say(message: str) -> None:
    """To the run's log; before there is one, to the terminal."""
    if logging.getLogger("polargrad_dist").handlers:
        log.error(message)
        return
    with suppress(OSError, ValueError, AttributeError):
        print(message, file=sys.stderr, flush=True)


def store_of_launcher(size: int, limit: float, start: str) -> dist.Store:
    """A connection of its own to the store that torchrun or rank 0 holds; requests end well before the limit.

    start: a word that all ranks share and no earlier start of them had: torchrun's store outlives its ranks, and its count of
    restarts differs between machines.
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
