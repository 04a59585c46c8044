"""What buckets of every kind do: stacked shards of alike parameters, their weights stepped and shared between copies."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from polargrad_dist.distributed.layout import Cut3, volume
from polargrad_dist.distributed.schedule import Bucket, Portion
from polargrad_dist.distributed.transport import Started
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.fused import averaged, stepped
from polargrad_dist.optim.member import Member, Travel, joined, slices
from polargrad_dist.optim.parts import decay_and_step, join_bf16, split_bf16

# A bucket's step: it yields each collective that it starts, None for a pause, and is resumed with what came back.
Steps = Generator[Started | None, Tensor, None]


class Batch:
    """This rank's shards of a bucket's parameters, stacked: (items, slices, rows, columns)."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        """``members`` are the bucket's parameters, item by item; this rank is of their team."""
        self.bucket, self.members, self.travel = bucket, list(members), travel
        first = self.first = members[0]
        self.entry, self.team, self.rule, self.group = first.entry, first.team, first.rule, first.group
        self.place, item = self.team.place, bucket.items[0]
        whole = self.entry.split is None or (item.first, item.last) == (0, self.entry.split.stack)
        self.slab = slice(None) if whole else slice(item.first, item.last)
        self.states: dict[str, Tensor] = {}
        self.loose: list[tuple[list[Tensor], Tensor]] = []
        self._kept: dict[str, Tensor] = {}
        # What compiles elementwise steps; nothing does where the weights are offloaded.
        self.backend = travel.backend if first.device == travel.device else None
        self.shares = bucket.shares
        # Which matrix row i of the numbers is of; which row each (item, slice, row, column) takes, None for item by item.
        self.arrival: list[tuple[int, int]] = [(0, 0)]
        self.index: Tensor | None = None
        self.places: Tensor | None = None
        if self.shares:
            self._find_copies()

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        raise AssertionError("each kind of bucket has its own")

    def _join(self, keys: Sequence[str]) -> None:
        """Stacks these states: their own memory where they lie together, else copies that are written back."""
        for key in keys:
            views = [m.held(key)[self.slab] for m in self.members]
            self.states[key], together = joined(views)
            if not together:
                self.loose.append((views, self.states[key]))

    def _find_copies(self) -> None:
        """The shards of all who store the same elements, within what each stores, in the order of their group."""
        order = self.team.copy_order
        self.boxes = [self.first.window_of(place) for place in order]
        shapes = {tuple(b - a for a, b in box) for box in self.boxes}
        axes = [axis for axis in range(3) if len({box[axis] for box in self.boxes}) > 1]
        self.longest = {
            id(part): max(volume(self._portion_of(part, box)) for box in self.boxes)
            for part in self.bucket.portions
        }
        self.axis = axes[0] if len(shapes) == len(axes) == 1 and order == sorted(order) else None

    def gradients(self) -> Tensor:
        """The gradients of the shards in the dtype of the state; not to be changed."""
        grads = self._own_gradients()
        stack = (torch.stack(grads) if len(grads) > 1 else grads[0].unsqueeze(0)).to(self.first.state_dtype)
        return stack if self.travel.shrink is None else self.travel.shrunk([stack])[0]

    def _own_gradients(self) -> list[Tensor]:
        return [self.travel.gradient(m)[self.slab] for m in self.members]

    def momentum(self) -> Tensor:
        """What the rule's direction is given: the momentum of this rank's shards, stacked."""
        group, travel = self.group, self.travel
        if self.backend is None or travel.ok is None or not self.rule.has_plain_momentum(group):
            self._kept = {} if travel.ok is None else self.kept()
            return self.rule.momentum(self.states, self.gradients(), group)
        self._kept = {}
        return averaged(travel, self.states["momentum"], self._own_gradients(), group)

    def advance(self, part: Portion, D: Tensor, scale: Tensor, ok: Tensor) -> Tensor | None:
        """Steps the weights of a portion along its direction, where ``ok``; returns what the copies are to be given.

        ``scale`` and ``ok`` are broadcast against D (items, slices, rows, columns).
        """
        states = self.states_of(part)
        if self.backend is None:
            return self.moved(part, self.rule.apply(states, D, scale, self.group), ok)
        plain = self.rule.is_plain(self.group)
        step = D if plain else self.rule.apply(states, D, scale, self.group).to(self.first.state_dtype)
        low, weights = self._weights(part)
        old = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
        new = stepped(self.travel, old, low, step, scale if plain else None, ok, self.group)
        return self._put(weights, old, new)

    def _weights(self, part: Portion) -> tuple[Tensor | None, list[Tensor]]:
        """A portion's low bits, of bf16 weights, and its weights."""
        low = self.states["low_bits"][part.items, :, part.rows] if "low_bits" in self.states else None
        return low, [m.weight()[self.slab, part.rows] for m in self.members[part.items]]

    def states_of(self, part: Portion) -> dict[str, Tensor]:
        """What the rule keeps of a portion."""
        return {k: v[part.items, :, part.rows] for k, v in self.states.items() if k != "low_bits"}

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers of each matrix in the order of `arrival`, to be broadcast against (items, slices, rows, columns)."""
        return numbers.view(-1, 1, 1, 1, *numbers.shape[1:]) if self.index is None else numbers[self.index]

    def moved(self, part: Portion, step: Tensor, ok: Tensor, shrink: Tensor | None = None) -> Tensor | None:
        """Adds a portion's step to its weights where ``ok``, then multiplies them; returns what copies are to be given."""
        low, weights = self._weights(part)
        decay, cautious = self.group["lr"] * self.group["weight_decay"], self.group["control"] == "cautious"
        sure = self.travel.ok is None and ok.device.type == "cpu" and bool(ok.all())
        if sure and not self.shares and weights[0].element_size() >= 4 and shrink is None:
            decay_and_step(weights, list(step.to(weights[0].dtype).unbind(0)), decay, cautious)
            return None
        old = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
        fresh = (
            len(weights) > 1 and self.travel.dtype is None
        )  # a copy already, of which nobody needs the old values
        x = join_bf16(old, low) if low is not None else old.to(self.first.state_dtype, copy=not fresh)
        before = None if sure else x.clone()
        decay_and_step([x], [step.to(x.dtype)], decay, cautious)
        if shrink is not None:
            x.mul_(shrink)
        if before is not None:
            x = torch.where(ok, x, before)
        return self._written(weights, old, x, low)

    def _written(self, weights: list[Tensor], old: Tensor, x: Tensor, low: Tensor | None) -> Tensor | None:
        """`_put` of new weights x in the dtype of the state."""
        if low is not None:
            x = split_bf16(x, low)
        elif old.element_size() < 4:
            x = x.to(old.dtype)
        return self._put(weights, old, x)

    def _put(self, weights: list[Tensor], old: Tensor, new: Tensor) -> Tensor | None:
        """Puts new weights into the parameters, or returns what is to be shared: them, or their difference to ``old``."""
        if self.shares and self.travel.dtype is not None and old.element_size() >= 4:
            return (new - old).to(self.travel.dtype)
        if self.shares:
            return new
        torch._foreach_copy_(weights, list(new.unbind(0)))
        return None

    def share(self, part: Portion, message: Tensor) -> Started:
        """Starts giving this rank's shards, or their updates, to those who store copies: (copies, items, longest)."""
        longest = self.longest[id(part)]
        flat = message.to(self.travel.device).reshape(len(message), -1)
        if flat.shape[1] < longest:
            flat = torch.cat([flat, flat.new_zeros(len(flat), longest - flat.shape[1])], 1)
        assert self.team.copies is not None
        return self.travel.traffic.all_gather(flat, self.team.copies)

    def _portion_of(self, part: Portion, box: Cut3) -> Cut3:
        """What a portion takes of a copy's shard, within what that copy stores."""
        depth, (top, bottom), across = box
        first, last, _ = part.rows.indices(bottom - top)
        depth = depth if self.slab == slice(None) else (self.slab.start, self.slab.stop)
        return depth, (top + first, top + max(first, last)), across

    def arrived(self, part: Portion, gathered: Tensor) -> None:
        """Writes what all copies have worked out."""
        stored = [m.stored() for m in self.members[part.items]]
        ours, theirs = [], []
        if self.axis is not None:
            for w, messages in zip(stored, gathered.unbind(1), strict=True):
                ours.append(
                    w.unflatten(self.axis, (len(self.boxes), -1)).movedim(self.axis, 0)[
                        :, self.slab, part.rows
                    ]
                )
                theirs.append(messages.view(ours[-1].shape))
        else:
            for box, messages in zip(self.boxes, gathered, strict=True):
                cut = self._portion_of(part, box)
                for w, message in zip(stored, messages, strict=True):
                    ours.append(w[slices(cut)])
                    theirs.append(message[: volume(cut)].view(ours[-1].shape))
        if gathered.dtype == self.entry.dtype and not (self.travel.dtype and self.entry.itemsize >= 4):
            torch._foreach_copy_(ours, theirs)
        else:
            torch._foreach_add_(ours, [x.to(ours[0].device, self.entry.dtype) for x in theirs])

    def kept(self) -> dict[str, Tensor]:
        """Copies of the states, since the step may turn out not to happen."""
        return {k: v.clone() for k, v in self.states.items() if k != "low_bits"}

    def settle(self) -> None:
        """Undoes the states where the step was not to happen, and writes back those that do not lie together."""
        for key, old in self._kept.items():
            assert self.travel.ok is not None
            self.states[key].copy_(torch.where(self.travel.ok.to(old.device), self.states[key], old))
        for views, stack in self.loose:
            torch._foreach_copy_(views, list(stack.unbind(0)))
