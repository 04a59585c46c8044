"""Checkpoints that survive a kill, a full disk and a flipped bit, and load at any world size and strategy.

``manifest`` knows the format, ``storage`` the bytes under torch.distributed.checkpoint, ``folder`` what is kept,
``ranks`` how ranks agree, and ``store`` brings them together.
``python -m polargrad_dist.trainer.checkpoint verify|list|show PATH`` looks at them.
"""

from polargrad_dist.trainer.checkpoint.folder import CheckpointConfig
from polargrad_dist.trainer.checkpoint.manifest import Manifest, checkpoints_in, folder_name, verify
from polargrad_dist.trainer.checkpoint.rng import restore_rng_state, rng_state
from polargrad_dist.trainer.checkpoint.store import CheckpointStore, Loaded

__all__ = [
    "CheckpointConfig",
    "CheckpointStore",
    "Loaded",
    "Manifest",
    "checkpoints_in",
    "folder_name",
    "restore_rng_state",
    "rng_state",
    "verify",
]
