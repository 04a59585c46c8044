"""The checkpoints of one run: saving atomically, and choosing the one to resume from.

A save is written to a hidden folder beside the older checkpoints, hashed and flushed by every rank, and at last renamed into
place by rank 0; existing checkpoints are never written to.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import polargrad_dist
from polargrad_dist.errors import CheckpointError
from polargrad_dist.trainer.checkpoint.folder import (
    SAVING,
    CheckpointConfig,
    clear_leftovers,
    finite,
    prune,
    remove,
    set_aside,
)
from polargrad_dist.trainer.checkpoint.manifest import (
    Manifest,
    SavedTensor,
    checkpoints_in,
    damage,
    differences,
    folder_name,
    misplaced,
    some,
    step_of,
    sync_folder,
)
from polargrad_dist.trainer.checkpoint.ranks import Ranks, cause, deal
from polargrad_dist.trainer.checkpoint.storage import Copies, HostCopies, Reader, StrictLoad, Writer, local

log = logging.getLogger("polargrad_dist.trainer.checkpoint")
# A run of one process needs no process group, and DCP would say so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Loaded:
    """The content of a checkpoint besides tensors; ``per_rank`` is None if another number of ranks saved it."""

    step: int
    objects: dict[str, Any]
    per_rank: dict[str, torch.Tensor] | None
    world_size: int


class CheckpointStore:
    """The checkpoints in ``folder``. All ranks call every method, in the same order.

    identity: JSON-able parts ("model", "tokenizer", "data") that must equal those of a checkpoint to load it.
    configuration: JSON-able, stored in every manifest for reference.
    run: the run's id, stored in every manifest; checkpoints of other runs in ``folder`` are skipped. None: any.
    timeout: how long a rank waits for the others while saving or loading; None is gloo's default, 30 minutes.

    ``last_saved`` is the step of the newest checkpoint that this store wrote or loaded; ``failed`` counts failed saves.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: CheckpointConfig | None = None,
        *,
        identity: dict[str, Any] | None = None,
        configuration: dict[str, Any] | None = None,
        run: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.config = config or CheckpointConfig()
        # Through JSON once, so that tuples equal the lists a manifest gives back.
        self.identity = json.loads(json.dumps(identity or {}))
        self.configuration = json.loads(json.dumps(configuration or {}))
        self.run = run
        self.last_saved: int | None = None
        self.failed = 0
        self._ranks = Ranks(timeout)
        self._origin: str | None = None
        # Its hashes are already checked, so that loading can skip them
        self._verified: Path | None = None
        # Renamed to aside-… after the load
        self._superseded: tuple[Path, list[Path]] | None = None
        self._saving = False
        self._losses: dict[str, float | None] = {}
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointError | None] | None = None
        self._pruning: Future[None] | None = None
        self._all_saved = True

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        *,
        objects: dict[str, Any] | None = None,
        per_rank: dict[str, torch.Tensor] | None = None,
        validation_loss: float | None = None,
    ) -> bool:
        """Saves the state after ``step`` steps; True if it is on disk or, if asynchronous, copied and being written.

        tensors: name to Tensor or DTensor, only those on this rank; tensors on several ranks are written once.
        objects: JSON-able; rank 0's are stored. per_rank: small tensors, stored for each rank.
        A failure raises CheckpointError on all ranks or returns False on all, depending on ``on_failure``; older
        checkpoints stay as they are. Waits first for a background save that is still running.
        """
        self._finish()
        if step == self.last_saved:
            return True
        named = tensors | {f"rank/{self._ranks.rank}/{name}": t for name, t in (per_rank or {}).items()}
        named = {name: tensor.detach() for name, tensor in named.items()}

        self._saving = True
        try:
            return self._save(step, named, objects, validation_loss)
        finally:
            self._saving = False

    def _save(
        self,
        step: int,
        named: dict[str, torch.Tensor],
        objects: dict[str, Any] | None,
        validation_loss: float | None,
    ) -> bool:
        def prepare() -> tuple[int, dict[str, int], str]:
            nonlocal objects
            objects = json.loads(json.dumps(objects or {}))
            temporary = self._make_room(step) if self._ranks.rank == 0 else ""
            sizes = {name: t.nbytes for name, t in named.items() if not isinstance(t, DTensor)}
            return step, sizes, temporary

        try:
            told = self._ranks.together(f"step {step} was not saved", prepare)
        except CheckpointError as error:
            return self._failure(error)
        steps, held, (temporary, *_) = zip(*told, strict=True)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"ranks save different steps, {steps} in rank order: their loops have parted"
            )
        mine = deal(held)[self._ranks.rank]
        named = {name: t for name, t in named.items() if isinstance(t, DTensor) or name in mine}
        manifest = self._describe(step, objects or {}, validation_loss)
        if self.config.asynchronous:
            self._pending = self._thread.submit(
                self._write, manifest, named, self._copies.of(named), temporary
            )
            return True
        failure = self._write(manifest, named, {name: local(t) for name, t in named.items()}, temporary)
        return True if failure is None else self._failure(failure)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written, here or in the background."""
        pending = self._pending
        return self._saving or (pending is not None and not pending.done())

    def wait(self) -> bool:
        """Waits for all work in the background; True if every save since the last ``wait`` is on disk."""
        self._finish()
        if self._pruning is not None:
            self._pruning.result()
        self._all_saved, saved = True, self._all_saved
        return saved

    def close(self) -> bool:
        """``wait``, then releases the process group and the buffers."""
        try:
            return self.wait()
        finally:
            self._thread.shutdown()
            self._copies.clear()
            self._ranks.close()

    def resume_point(self) -> Path | None:
        """The checkpoint to start from, by ``config.resume``; None to start from scratch. Removes a killed run's leftovers.

        After it is loaded, newer checkpoints in this folder (damaged, misplaced, or of an abandoned branch) are renamed to
        ``aside-…``, so that no later start picks them. A run that began at a path resumes from its own checkpoints when it
        is restarted with the same path. Raises CheckpointError if there are checkpoints but no valid one.
        """
        self._finish()
        self._ranks.on_rank_0("clearing the checkpoint folder", lambda: clear_leftovers(self.folder))
        own = self._list()
        if self.config.resume == "never" and own:
            raise CheckpointError(
                f"trainer.checkpoint.resume is never, but {self.folder} holds {own[-1].name}: "
                "choose another run directory, or trainer.checkpoint.resume=auto"
            )
        if not own and self.config.resume in ("never", "auto"):
            return None
        chosen = self._choose(own)
        if chosen.parent == self.folder:
            newer = [path for path in own if (step_of(path) or 0) > (step_of(chosen) or 0)]
            self._superseded = chosen, newer
        return chosen

    def newest_valid(self) -> Path | None:
        """The newest checkpoint in which every byte is intact. Logs which ones it skips and why; changes nothing."""
        self._finish()
        return self._newest_valid(self._list())[0]

    def load(self, path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> Loaded:
        """Fills ``tensors`` in place: each rank reads its own, whole or sharded, however they were saved.

        Raises CheckpointError on all ranks for damage, missing names, other shapes, another model, tokenizer or data.
        """
        self._finish()
        path, rank = Path(path).resolve(), self._ranks.rank
        self._ranks.together(f"{path} was not loaded", lambda: self._admit(path))
        manifest, per_rank = Manifest.read(path), None
        if manifest.world_size == self._ranks.world:
            per_rank = {
                name.removeprefix(f"rank/{rank}/"): torch.empty(saved.shape, dtype=saved.dtype)
                for name, saved in manifest.tensors.items()
                if name.startswith(f"rank/{rank}/")
            }
        elif rank == 0:
            ranks = (manifest.world_size, self._ranks.world)
            log.warning(
                "%s was saved by %d ranks and is loaded by %d: random generators start anew", path, *ranks
            )
        try:
            dcp.load(
                {name: tensor.detach() for name, tensor in tensors.items()}
                | {f"rank/{rank}/{name}": tensor for name, tensor in (per_rank or {}).items()},
                storage_reader=Reader(path, manifest, self.config.threads, check=path != self._verified),
                planner=StrictLoad(manifest),
                process_group=self._ranks.group,
                no_dist=self._ranks.group is None,
            )
        except (Exception, dcp.CheckpointException) as error:
            raise CheckpointError(f"{path} was not loaded: {cause(error)}") from None
        self._verified = None
        if self._superseded is not None and self._superseded[0] == path:
            newer = self._superseded[1]
            self._ranks.on_rank_0(
                "renaming", lambda: set_aside(newer, f"resuming from the older {path.name}")
            )
            self._superseded = None
        own = path.parent == self.folder
        self.last_saved = manifest.step if own else None
        self._origin = manifest.origin if own and path != self._asked_for else str(path)
        return Loaded(manifest.step, manifest.objects, per_rank, manifest.world_size)

    def _describe(self, step: int, objects: dict[str, Any], validation_loss: float | None) -> Manifest:
        return Manifest(
            step=step,
            world_size=self._ranks.world,
            tensors={},
            objects=objects,
            identity=self.identity,
            configuration=self.configuration,
            versions={
                "polargrad_dist": polargrad_dist.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            validation_loss=validation_loss,
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            origin=self._origin,
            run=self.run,
        )

    def _write(
        self,
        manifest: Manifest,
        named: dict[str, torch.Tensor],
        data: dict[str, torch.Tensor] | CheckpointError,
        temporary_name: str,
    ) -> CheckpointError | None:
        """The whole transaction, on this thread or in the background. Returns an error instead of raising it."""
        final = self.folder / folder_name(manifest.step)
        temporary = final.with_name(temporary_name)
        started = time.monotonic()

        def commit(tensors: dict[str, SavedTensor]) -> None:
            replace(manifest, tensors=tensors).write(temporary)
            temporary.rename(final)
            sync_folder(self.folder)

        try:
            dcp.save(
                named,
                storage_writer=Writer(temporary, self.config.threads, commit),
                planner=Copies(data),
                process_group=self._ranks.group,
                no_dist=self._ranks.group is None,
            )
        except (Exception, dcp.CheckpointException) as error:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            return CheckpointError(
                f"step {manifest.step} was not saved: {cause(error)}. "
                f"Older checkpoints in {self.folder} are untouched"
            )
        if self._ranks.rank == 0:
            log.info("saved %s in %.1f s", final, time.monotonic() - started)
            self._losses[final.name] = finite(manifest.validation_loss)
            # Deleting gigabytes takes a while, and nobody waits for it.
            self._pruning = self._thread.submit(prune, self.folder, self.config, self._losses)
        self.last_saved = manifest.step
        return None

    def _finish(self) -> None:
        if self._pending is not None:
            error = self._pending.result()
            self._pending = None
            if error is not None:
                self._failure(error)

    def _failure(self, error: CheckpointError) -> bool:
        self.failed += 1
        self._all_saved = False
        if (self.config.on_failure or ("continue" if self.config.asynchronous else "raise")) == "raise":
            raise error
        if self._ranks.rank == 0:
            log.error("%s; training goes on (failed saves so far: %d)", error, self.failed)
        return False

    def _make_room(self, step: int) -> str:
        """On rank 0: removes what a killed save of this step left, and renames a damaged checkpoint of the same step.

        Returns the name of the folder to write into: a different one if the leftover cannot be deleted.
        """
        final = self.folder / folder_name(step)
        temporary, n = final.with_name(SAVING + final.name), 1
        while os.path.lexists(temporary) and not remove(temporary):
            n += 1
            temporary = final.with_name(f"{SAVING}{final.name}-{n}")
        if os.path.lexists(final):
            if (reason := self._damage(final, (0, 1))) is None:
                raise CheckpointError(f"{final} exists and is valid, and is not written over")
            set_aside([final], reason)
        return temporary.name

    @property
    def _asked_for(self) -> Path:
        return Path(self.config.resume).resolve()

    def _run_at(self, path: Path) -> str | None:
        """The run that a checkpoint must belong to; None if it was requested by path or is in another folder."""
        return self.run if path.parent == self.folder and path != self._asked_for else None

    def _list(self) -> list[Path]:
        return self._ranks.on_rank_0(f"listing {self.folder}", lambda: checkpoints_in(self.folder))

    def _choose(self, own: list[Path]) -> Path:
        """The checkpoint for ``config.resume``, auto or a path, if the folder holds ``own``."""
        newest, skipped = self._newest_valid(own)
        if self.config.resume == "auto":
            if newest is None:
                raise CheckpointError(
                    f"no checkpoint in {self.folder} is valid: {some(skipped)}. "
                    "Restore one, or start in another run directory"
                )
            return newest
        path = self._asked_for
        if path.parent == self.folder and step_of(path) is None:
            raise CheckpointError(
                f"trainer.checkpoint.resume is {path}, expected a checkpoint step-…: rename one that was set aside to its "
                "former name to resume from it"
            )
        origin = None if newest is None else self._origin_of(newest)
        if newest is not None and origin is not None and Path(origin).resolve() == path:
            if self._ranks.rank == 0:
                log.info("this run began from %s and resumes from its own %s", path, newest.name)
            return newest
        if own and path.parent != self.folder:
            raise CheckpointError(
                f"trainer.checkpoint.resume is {path}, but {self.folder} holds {own[-1].name} of a run that did not "
                "begin there: choose another run directory, or trainer.checkpoint.resume=auto"
            )
        if path != newest and self._newest_valid([path])[0] is None:
            raise CheckpointError(
                f"trainer.checkpoint.resume is {path}, which is no valid checkpoint (see the log)"
            )
        return path

    def _origin_of(self, path: Path) -> str | None:
        return self._ranks.on_rank_0(f"reading {path}", lambda: Manifest.read(path).origin)

    def _newest_valid(self, paths: list[Path]) -> tuple[Path | None, list[str]]:
        """The last valid one of ``paths`` and why later ones are invalid; the ranks share the reading."""
        skipped: list[str] = []
        for path in reversed(paths):
            reasons = self._ranks.gather(self._damage(path, (self._ranks.rank, self._ranks.world)))
            if not any(reasons):
                self._verified = path
                return path, skipped
            skipped.append(f"{path.name}: {next(reason for reason in reasons if reason)}")
            if self._ranks.rank == 0:
                log.warning("skipping checkpoint %s", skipped[-1])
        return None, skipped

    def _damage(self, path: Path, share: tuple[int, int]) -> str | None:
        try:
            manifest = Manifest.read(path)
            if reason := misplaced(path, manifest, self._run_at(path)):
                return reason
            found = damage(path, manifest, share=share, threads=self.config.threads)
            return some(found) if found else None
        except (CheckpointError, OSError) as error:
            return str(error)

    def _admit(self, path: Path) -> None:
        """Raises CheckpointError for another model, tokenizer or data, naming the differences."""
        manifest = Manifest.read(path)
        if reason := misplaced(path, manifest, self._run_at(path)):
            raise CheckpointError(reason)
        identity = manifest.identity
        for part in sorted(identity.keys() | self.identity.keys()):
            found = list(differences(identity.get(part), self.identity.get(part), part))
            if found and part == "data" and self.config.allow_other_data:
                if self._ranks.rank == 0:
                    log.warning("going on from %s with other data: %s", path, some(found))
            elif found:
                way = ", or set trainer.checkpoint.allow_other_data=true" if part == "data" else ""
                raise CheckpointError(
                    f"it is of another {part}: {some(found)}. Run with what it was made with{way}"
                )
