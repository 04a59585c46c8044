"""Checkpoints that survive a kill, a full disk and a flipped bit, and load at any world size and strategy.

``manifest`` is the format, ``storage`` the bytes under torch.distributed.checkpoint, ``folder`` the choice of what to keep,
``ranks`` the agreement between ranks, and ``store`` combines them.
``python -m polargrad_dist.trainer.checkpoint verify|list|show PATH`` inspects them.
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
