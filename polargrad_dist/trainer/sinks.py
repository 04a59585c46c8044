"""Custom sinks: where the records of a run go besides the console, ``metrics.jsonl``, TensorBoard and wandb.

docs/metrics.md describes the fields of a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polargrad_dist.errors import ConfigError


class Sink(Protocol):
    """Receives records. A sink that raises is named in the log and dropped; training goes on.

    A sink may also have ``attach(path)``, which is called with the run's HTML report at the end.
    """

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What a sink knows about its run.

    run_id: the same across resumes. first: the step that a resume starts from, 0 for a new run; records of later steps that
    the sink already has will be written again. configuration: the whole run's, JSON-able.
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

    name: its name in the log; a second factory of the same name replaces the first. Raises ``ConfigError`` for
    the name of a built-in sink.
    """
    if name in TAKEN or not name:
        raise ConfigError(
            f"register_sink() is given the name {name!r}, expected one other than {', '.join(TAKEN)}"
        )
    _FACTORIES[name] = factory


def unregister_sink(name: str) -> None:
    """Removes a registered sink; runs that have started keep it."""
    _FACTORIES.pop(name, None)


def registered() -> dict[str, Callable[[RunInfo], Sink]]:
    """The factories by name."""
    return dict(_FACTORIES)
