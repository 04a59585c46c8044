"""One limit for every wait: a rank that waits for the others longer than it says which of them it waits for, and ends.

Each rank tells the launcher's store every few seconds that it is alive and how far it has come. A collective alone could
not say who is missing, and on a GPU would end the process without a word.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from polargrad_dist.errors import TrainingError

log = logging.getLogger("polargrad_dist.trainer")
SAY_EVERY = 60.0


@dataclass(frozen=True)
class Sign:
    """What a rank last said: how many places it has passed, how often it has said so, and where it is."""

    places: int
    beats: int
    where: str


class Watch:
    """Watches the other ranks from a thread; ends this process when it has waited ``limit`` seconds for one of them."""

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float):
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.interval = min(5.0, limit / 20)
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

    def wait_for_rank_0(self, key: str, doing: str, tell: bool) -> None:
        """Returns once rank 0 has set ``key``, however long it takes, as long as rank 0 gives signs of life.

        tell: say once a minute what is being waited for. Raises ``TrainingError`` when rank 0 has been silent for the limit.
        """
        began = said = heard = time.monotonic()
        last: Sign | None = None
        while True:
            with suppress(dist.DistError):
                self.store.wait([key], timedelta(seconds=max(0.1, self.interval)))
                return
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
            if time.monotonic() - self._since > 0.75 * self.limit:
                self._judge()

    def _beat(self) -> None:
        self._beats += 1
        with suppress(dist.DistError):
            self.store.set(str(self.rank), f"{self._places} {self._beats} {self._where}")

    def _sign(self, rank: int) -> Sign | None:
        try:
            places, beats, where = self.store.get(str(rank)).decode().split(" ", 2)
            return Sign(int(places), int(beats), where)
        except dist.DistError:
            return None

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
        silent = [rank for rank in others if after[rank] is None or after[rank] == before[rank]]
        behind = [
            rank for rank in others if rank not in silent and (sign := after[rank]) and sign.places < places
        ]
        if not silent and not behind:
            self._since = time.monotonic()
            return
        if all(sign is None for sign in after):
            found = "the store that the ranks met at does not answer (rank 0 or torchrun holds it)"
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


def store_of_launcher(size: int, limit: float) -> dist.Store:
    """A connection of its own to the store that torchrun or rank 0 holds; requests end well before the limit."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=size,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=max(1.0, math.ceil(limit / 20))),
    )
    return dist.PrefixStore(f"polargrad watch {restart}", store)
