"""The run directory: one configuration, its metrics, its log, its checkpoints; another configuration is refused."""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from polargrad_dist.errors import ConfigError

# What may differ between two starts of one run without making it another run.
FREE = (
    "trainer.run_dir",
    "trainer.steps",
    "trainer.micro_batch",
    "trainer.device",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.allow_changes",
    "trainer.strategy",
    "trainer.evaluation",
    "trainer.logging",
    "trainer.diagnostics",
    "trainer.checkpoint",
    "trainer.safety.max_skipped",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "optimizer.bucket_mb",
    "optimizer.gradients",
    "optimizer.comm_dtype",
)


def check(folder: Path, configuration: dict[str, Any], allow_changes: bool, resume: str) -> None:
    """Raises ``ConfigError`` when the folder holds a run of another configuration, naming the first keys that differ, or
    checkpoints that were not to be resumed. Writes nothing."""
    config_path = folder / "config.yaml"
    known = read(config_path) if config_path.exists() and not allow_changes else configuration
    if differ := differences(known, configuration):
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(differ[:3])}): choose another "
            "trainer.run_dir, or set trainer.allow_changes to true"
        )
    if resume == "never" and any((folder / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"{folder} already holds checkpoints and trainer.checkpoint.resume is 'never': choose another "
            "trainer.run_dir, or set resume to 'auto'"
        )


def claim(folder: Path, configuration: dict[str, Any]) -> str:
    """Makes the folder this configuration's, and returns the run's id; for one process, when nothing can be refused any more.

    Raises ``ConfigError`` when it cannot be written.
    """
    config_path, id_path = folder / "config.yaml", folder / "run_id"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not id_path.exists():
            write(id_path, uuid.uuid4().hex[:12])
        write(config_path, dump(configuration))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): choose another trainer.run_dir"
        ) from error
    return id_path.read_text().strip()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old -> new`` for every key that makes it another run."""
    before, after = leaves(json.loads(json.dumps(old))), leaves(json.loads(json.dumps(new)))
    keys = [key for key in after | before if before.get(key) != after.get(key)]
    keys = [key for key in keys if not any(key == free or key.startswith(free + ".") for free in FREE)]
    return [f"{key}: {before.get(key)!r} there, {after.get(key)!r} here" for key in keys]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def read(path: Path) -> dict[str, Any]:
    """The configuration that a run directory keeps; raises ``ConfigError`` when it is not one."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as a configuration ({reason})") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no configuration, expected keys and values: remove it, or choose another run_dir"
        )
    return content


def dump(configuration: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(configuration)), sort_keys=False)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def start_log(folder: Path, rank: int) -> None:
    """Warnings and news of this project to the terminal (rank 0) and to the run's log (all ranks, with their number)."""
    root = logging.getLogger("polargrad_dist")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "log.txt")]
    handlers += [logging.StreamHandler()] if rank == 0 else []
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S")
        )
        root.addHandler(handler)
