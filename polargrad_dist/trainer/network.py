"""Process setup before joining the group: file descriptors for connections, network cards, the GPU's allocator."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from polargrad_dist.errors import ConfigError
from polargrad_dist.limits import MESHES, OTHERS, make_room


def make_room_for_connections(size: int) -> None:
    """Raises the limit of open files to what ``size`` ranks need. Raises ``ConfigError`` if the system forbids it."""
    make_room(MESHES * (size + 3) + OTHERS, f"{size:,} ranks, which are all connected to each other")


def gloo_interfaces(wish: str, present: Sequence[str]) -> str | None:
    """``NCCL_SOCKET_IFNAME`` as ``GLOO_SOCKET_IFNAME``; None if it names none of the network cards that are ``present``.

    NCCL takes prefixes of names, exact names after "=", and exclusions after "^"; gloo takes exact names only.
    """
    exclude = wish.startswith("^")
    exact = wish.lstrip("^").startswith("=")
    names = [name.split(":")[0] for name in wish.lstrip("^=").split(",") if name]

    def named(card: str) -> bool:
        return any(card == name if exact else card.startswith(name) for name in names)

    chosen = [card for card in present if named(card) != exclude and not (exclude and card == "lo")]
    return chosen[0] if chosen else None


def prepare(size: int, gpu: bool) -> None:
    """Sets up this process for ``size`` ranks; variables that are already set are kept."""
    make_room_for_connections(size)
    wish = os.environ.get("NCCL_SOCKET_IFNAME")
    if wish and "GLOO_SOCKET_IFNAME" not in os.environ:
        cards = [name for _, name in socket.if_nameindex()]
        card = gloo_interfaces(wish, cards)
        if card is None:
            raise ConfigError(
                f"NCCL_SOCKET_IFNAME is {wish!r}, which names no network card of this machine ({', '.join(cards)}): correct "
                "it, or set GLOO_SOCKET_IFNAME as well"
            )
        os.environ["GLOO_SOCKET_IFNAME"] = card
    if gpu and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Attention windows and pieces of the loss change size: fixed segments would leave gaps.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
