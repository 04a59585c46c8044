"""Keys and values of the tokens that a GPT-2 model has seen, so that the next one costs one token's work."""

from __future__ import annotations

import torch

from models.attention import BLOCK, Mask


class Cache:
    """Per layer keys and values (B, heads, T, d), and of each token its document (B, T). Filled by the model's forward."""

    def __init__(self) -> None:
        self.docs: torch.Tensor | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.docs is None else self.docs.shape[1]

    def documents(self, tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
        """(B, T) document of each new token, counted on from the old ones, which it joins."""
        docs = (tokens == end_of_text).cumsum(1)
        if self.docs is not None:
            docs = docs + self.docs[:, -1:]
        self.docs = docs if self.docs is None else torch.cat([self.docs, docs], 1)
        return docs

    def mask(self, docs: torch.Tensor, window: int) -> Mask:
        """What new tokens of documents docs (B, T) see of all tokens; a window counts in whole blocks, as in training."""
        # `documents` comes first
        assert self.docs is not None
        keys = torch.arange(self.length, device=docs.device)
        queries = keys[-docs.shape[1] :, None]
        near = (queries >= keys) & (queries // BLOCK - keys // BLOCK < max(1, window // BLOCK))
        return Mask(dense=(near & (docs[:, :, None] == self.docs[:, None, :])).unsqueeze(1), cache=self)

    def join(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all tokens so far: the layer's old ones and the new k, v (B, heads, T, d)."""
        if layer in self._layers:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self._layers[layer], (k, v), strict=True))
        self._layers[layer] = (k, v)
        return k, v
