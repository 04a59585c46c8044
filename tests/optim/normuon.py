"""NorMuon (Li et al. 2025) as a rule of one's own: the polar factor's rows divided by a running root mean square of each.

A rule whose state belongs to whole matrices, for tests of what is kept at owners.
"""

from __future__ import annotations

import torch

from polargrad_dist.optim import Direction, Polar, register_rule


@register_rule("normuon of the tests")
class NorMuon(Polar):
    """D = U / sqrt(v), of the length of U, where v is an average of the squares of each of U's rows."""

    options = {"beta2": 0.9}  # noqa: RUF012

    def owner_states(self, group):
        return {"row_moment": lambda m, n: (m,), "seen": lambda m, n: (1,)}

    def direction(self, A, state, group):
        u, s, vh = torch.linalg.svd(A, full_matrices=False)
        U, seen = u @ vh, state["seen"] + 1
        moment = state["row_moment"].lerp(U.square().mean(-1), 1 - group["beta2"])
        corrected = moment / (1 - group["beta2"] ** seen)
        D = U / corrected.sqrt().unsqueeze(-1)
        D = D * (U.norm(dim=(-2, -1)) / D.norm(dim=(-2, -1)))[:, None, None]
        nuclear = s.sum(-1)
        return Direction(
            D, self.scale(A.shape[-2:], nuclear, group), {"row_moment": moment, "seen": seen}, nuclear
        )
