"""The limit of open files: connections to other ranks and memory-mapped shards may need more than the usual 1,024."""

from __future__ import annotations

import os
import resource

from polargrad_dist.errors import ConfigError

# gloo connects every rank to every other, once for the run's own group (and each mesh) and once for checkpoints.
MESHES = 4
# Libraries, logs, NCCL's sockets
OTHERS = 256


def make_room(needed: int, purpose: str, spare: int = 0) -> None:
    """Raises the limit of open files to ``needed`` + ``spare``, or as far beyond ``needed`` as the system allows.

    purpose: what needs them, for the error. Raises ``ConfigError`` if the system forbids ``needed``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed + spare
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit < needed:
        raise ConfigError(
            f"this process may open {hard:,} files, expected {wanted:,} for {purpose}: raise the hard limit (ulimit -Hn "
            f"{wanted}, LimitNOFILE in Slurm's or Docker's unit)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def open_files() -> int:
    """How many files this process has open; 0 where the system does not list them."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0
