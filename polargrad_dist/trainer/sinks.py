"""Sinks of one's own: where the records of a run go besides the console, ``metrics.jsonl``, TensorBoard and wandb.

What a record holds is in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polargrad_dist.errors import ConfigError


class Sink(Protocol):
    """Where records go. One that raises is named in the log and dropped; training goes on.

    A sink may also have ``attach(path)``, which gets the HTML report of the run when it ends.
    """

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a sink is told of its run.

    run_id: the same over all resumes. first: the step that a resume goes on from, 0 for a fresh start; records of later
    steps that the sink holds already are about to be written anew. configuration: the whole run's, JSON-able.
    """

    run_dir: Path
    run_id: str
    configuration: dict[str, Any]
    steps: int
    first: int


_FACTORIES: dict[str, Callable[[RunInfo], Sink]] = {}
TAKEN = ("metrics.jsonl", "TensorBoard", "wandb")


def register_sink(name: str, factory: Callable[[RunInfo], Sink]) -> None:
    """Sends the records of every run that this process starts from now on to ``factory(run)`` too; on rank 0 only.

    name: what the log calls it; a second factory under one name takes the place of the first. Raises ``ConfigError`` for
    the name of a built-in sink.
    """
    if name in TAKEN or not name:
        raise ConfigError(
            f"register_sink() is given the name {name!r}, expected one other than {', '.join(TAKEN)}"
        )
    _FACTORIES[name] = factory


def unregister_sink(name: str) -> None:
    """Forgets a registered sink; runs that have begun keep it."""
    _FACTORIES.pop(name, None)


def registered() -> dict[str, Callable[[RunInfo], Sink]]:
    """The factories by name."""
    return dict(_FACTORIES)
