"""Runs independent tasks in processes with one thread each, with one progress bar over all steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from experiments.curves import Curve, follow
from experiments.methods import METHODS
from experiments.problems import PROBLEMS
from experiments.workers import SPAWN, worker_pool

# Steps between records.
EVERY = {"quadratic": 10, "logistic": 25, "completion": 10}


@dataclass(frozen=True)
class Task:
    """One run; only numbers and names, so that it can be sent to a process."""

    problem: str
    method: int
    seed: int
    steps: int


# Steps finished by all processes; shared memory.
_done: Any = None


def _share(counter: Any) -> None:
    global _done
    _done = counter
    torch.set_num_threads(1)


def _advance(count: int) -> None:
    with _done.get_lock():
        _done.value += count


def _follow(task: Task) -> Curve:
    problem = PROBLEMS[task.problem](task.seed)
    method = METHODS[task.problem][task.method]
    return follow(problem, method, task.seed, task.steps, EVERY[task.problem], _advance)


def curves_of(tasks: list[Task], jobs: int) -> list[Curve]:
    """The curves of all tasks, in order, computed by ``jobs`` processes (1: this one), with progress on stderr."""
    total = sum(task.steps for task in tasks)
    counter = SPAWN.Value("l", 0)
    with tqdm(total=total, unit="step", disable=None, smoothing=0.05) as bar:
        if jobs == 1:
            threads = torch.get_num_threads()
            _share(counter)
            found = []
            for task in tasks:
                bar.set_description(f"{task.problem}, {METHODS[task.problem][task.method].name}")
                found.append(_follow(task))
                bar.update(counter.value - bar.n)
            torch.set_num_threads(threads)
            return found
        with worker_pool(jobs, _share, counter) as pool:
            futures = [pool.submit(_follow, task) for task in tasks]
            for finished in _waiting(futures):
                bar.set_description(f"{finished} of {len(tasks)} runs")
                bar.update(counter.value - bar.n)
            return [future.result() for future in futures]


def _waiting(futures: list[Future[Curve]]) -> Iterator[int]:
    """Yields the number of finished runs twice a second until all are; raises a run's error immediately."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, 0.5, FIRST_COMPLETED)
        for future in finished:
            if future.exception():
                for other in pending:
                    other.cancel()
                future.result()
        yield len(futures) - len(pending)
