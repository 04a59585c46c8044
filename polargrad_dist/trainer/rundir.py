"""The run directory: one configuration with its metrics, log and checkpoints; other configurations are refused."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.checkpoint import checkpoints_in

log = logging.getLogger("polargrad_dist.trainer")

_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
# Keys that may change between two starts of the same run.
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
    "trainer.samples",
    "trainer.logging",
    "trainer.diagnostics",
    "trainer.checkpoint",
    "trainer.safety.max_skipped",
    "model.init_from",
    "data.validation_sets",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "optimizer.bucket_mb",
    "optimizer.gradients",
    "optimizer.comm_dtype",
)


def check(folder: Path, configuration: dict[str, Any], allow_changes: bool, resume: str) -> None:
    """Raises ``ConfigError`` if the folder holds a run of another configuration, naming the first keys that differ, or
    checkpoints although ``resume`` is never. Writes nothing."""
    config_path = folder / "config.yaml"
    known = read(config_path) if config_path.exists() and not allow_changes else configuration
    if differ := differences(known, configuration):
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(differ[:3])}), expected the same: choose another "
            "trainer.run_dir, or set trainer.allow_changes to true"
        )
    if resume == "never" and checkpoints_in(folder / "checkpoints"):
        raise ConfigError(
            f"{folder} already holds checkpoints and trainer.checkpoint.resume is 'never': choose another "
            "trainer.run_dir, or set resume to 'auto'"
        )


class Hold:
    """A lock on the run directory while a process trains in it; the system releases it when the process dies.

    Two processes would delete each other's unfinished checkpoints. One rank holds it for all.
    """

    def __init__(self, folder: Path, patience: float):
        """patience: seconds to wait for a process that may be ending, as after a requeue."""
        self.folder, self.patience = folder, patience
        self._lock = FileLock(folder / ".lock")
        self._made = False

    def take(self) -> None:
        """Makes the directory if it is missing, and takes the lock; a second call does nothing.

        Raises ``ConfigError`` if the directory cannot be made or stays locked.
        """
        if self._lock.is_locked:
            return
        try:
            self._made |= not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"trainer.run_dir is {self.folder}, {'which' if str(self.folder) == error.filename else error.filename} is a "
                "file: expected a folder, or a name for a new one"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be made ({error.strerror}): choose another trainer.run_dir"
            ) from error
        try:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                log.warning(
                    "another process trains in %s: waiting up to %.0f s for it to end",
                    self.folder,
                    self.patience,
                )
                self._lock.acquire(timeout=self.patience)
        except Timeout:
            raise ConfigError(
                f"another process trains in {self.folder}, expected one at a time: wait for it or end it, or choose another "
                "trainer.run_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno in _READ_ONLY:
                raise ConfigError(
                    f"{self.folder} cannot be written ({error.strerror}): choose another trainer.run_dir"
                ) from error
            log.warning("%s cannot be locked (%s): nothing keeps a second process out", self.folder, error)

    def release(self) -> None:
        self._lock.release()

    def abandon(self) -> None:
        """Releases the directory of a run that was refused, and removes it if it was made for that run."""
        if self._lock.is_locked and self._made:
            with contextlib.suppress(OSError):
                for name in ("log.txt", ".lock"):
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()
        self.release()


def run_id(folder: Path) -> str:
    """The id of the run in the folder, or a new one, which only `claim` writes."""
    try:
        known = (folder / "run_id").read_text().strip()
    except FileNotFoundError:
        known = ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'run_id'} cannot be read ({error}): restore it from a copy") from error
    return known or uuid.uuid4().hex[:12]


def claim(folder: Path, configuration: dict[str, Any], run: str) -> None:
    """Writes the run's id and configuration into its directory; called by one rank once all checks have passed.

    Raises ``ConfigError`` if they cannot be written.
    """
    try:
        write(folder / "run_id", run)
        write(folder / "config.yaml", dump(configuration))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): choose another trainer.run_dir"
        ) from error


def tell_launcher() -> None:
    """Creates the file that tells a batch script that the run is finished, if the script names one."""
    if path := os.environ.get("POLARGRAD_FINISHED"):
        try:
            Path(path).touch()
        except OSError as error:
            log.warning(
                "%s cannot be created (%s): the batch script will say that this run, which is finished, is not",
                path,
                error.strerror,
            )


def expect(folder: Path, *names: str) -> None:
    """Raises ``ConfigError`` for a folder that is not a run directory: one without these files."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder, expected the run directory (trainer.run_dir) of a run")
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} is not a run directory (it holds no {name}): expected the trainer.run_dir of a run"
            )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The old and new value of every key that may not change within a run."""
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
    """The configuration in a run directory; raises ``ConfigError`` if it cannot be read."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        # ValueError: bytes that are no text
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read as a configuration ({reason}): remove it, or choose another run_dir"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds no configuration, expected keys and values: remove it, or choose another run_dir"
        )
    return content


def dump(configuration: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(configuration)), sort_keys=False)


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
