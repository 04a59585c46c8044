"""What every kind of bucket shares: it stacks this rank's shards, steps their weights and sends them to ranks with copies."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from polargrad_dist.distributed.layout import Cut3, slices, volume
from polargrad_dist.distributed.schedule import Bucket, Portion
from polargrad_dist.distributed.transport import Started
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.control import lengths, per_matrix
from polargrad_dist.optim.elements import join_bf16, split_bf16
from polargrad_dist.optim.facts import Facts
from polargrad_dist.optim.matrix import decay_and_step, relative, width_factor
from polargrad_dist.optim.member import Member, Travel

# A bucket's step: it yields each collective that it starts, or None for a pause, and is resumed with the result.
Steps = Generator[Started | None, Tensor, None]


class Batch:
    """This rank's shards of a bucket's parameters, stacked: (items, slices, rows, columns)."""

    def __init__(self, bucket: Bucket, members: Sequence[Member], travel: Travel):
        """``members`` are the bucket's parameters, item by item; this rank is in their team."""
        self.bucket, self.members, self.travel = bucket, list(members), travel
        first = self.first = members[0]
        self.entry, self.team, self.rule, self.group = first.entry, first.team, first.rule, first.group
        self.place, item = self.team.place, bucket.items[0]
        whole = self.entry.split is None or (item.first, item.last) == (0, self.entry.split.stack)
        self.slab = slice(None) if whole else slice(item.first, item.last)
        self.states: dict[str, Tensor] = {}
        self.loose: list[tuple[list[Tensor], Tensor]] = []
        self._kept: dict[str, Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        # The compiler of elementwise steps; None if the weights are offloaded.
        self.backend = travel.backend if first.device == travel.device else None
        self.shares = bucket.shares
        # The matrix that row i of the numbers belongs to; the row of each (item, slice, row, column), None for one per item.
        self.arrival: list[tuple[int, int]] = [(0, 0)]
        self.index: Tensor | None = None
        self.places: Tensor | None = None
        if self.shares:
            self._find_copies()

    def run(self, facts: Facts) -> Steps:
        """The bucket's step."""
        raise AssertionError("each kind of bucket overrides this")

    def _join(self, keys: Sequence[str]) -> None:
        """Stacks these states: a view if they are adjacent in memory, else copies that are written back."""
        for key in keys:
            views = [m.held(key)[self.slab] for m in self.members]
            self.states[key], together = joined(views)
            if not together:
                self.loose.append((views, self.states[key]))

    def _find_copies(self) -> None:
        """Finds the shards of all ranks that store the same elements, relative to what each stores, in group order."""
        order = self.team.copy_order
        self.boxes = [self.first.window(place) for place in order]
        shapes = {tuple(b - a for a, b in box) for box in self.boxes}
        axes = [axis for axis in range(3) if len({box[axis] for box in self.boxes}) > 1]
        self.longest = {
            id(part): max(volume(self._portion_of(part, box)) for box in self.boxes)
            for part in self.bucket.portions
        }
        self.axis = axes[0] if len(shapes) == len(axes) == 1 and order == sorted(order) else None

    def momentum(self) -> Tensor:
        """The input of the rule's direction: the momentum of this rank's shards, stacked."""
        group, travel = self.group, self.travel
        # The copies may be out of date: the state may since have been loaded, or stepped in another bucket.
        for views, stack in self.loose:
            torch._foreach_copy_(list(stack.unbind(0)), views)
        grads = [travel.gradient(m)[self.slab] for m in self.members]
        if self.backend is not None and travel.ok is not None and self.rule.has_plain_momentum(group):
            self._kept = {}
            return travel.averaged(self.states["momentum"], grads, group)
        # Copies, if the step may still be skipped.
        kept = {} if travel.ok is None else self.states
        self._kept = {key: state.clone() for key, state in kept.items() if key != "low_bits"}
        stack = (torch.stack(grads) if len(grads) > 1 else grads[0].unsqueeze(0)).to(self.first.state_dtype)
        if travel.shrink is not None:
            (stack,) = travel.shrunk([stack])
        return self.rule.momentum(self.states, stack, group)

    def spread(self, numbers: Tensor) -> Tensor:
        """Numbers of each matrix, in the order of `arrival`, shaped to broadcast against (items, slices, rows, columns)."""
        return numbers.view(-1, 1, 1, 1, *numbers.shape[1:]) if self.index is None else numbers[self.index]

    def advance(
        self, part: Portion, D: Tensor, ok: Tensor, scale: Tensor | None = None, shrink: Tensor | None = None
    ) -> Tensor | None:
        """Steps the weights of a portion along its direction D, where ``ok``; returns what to send to copies, if any.

        ``ok``, ``scale`` and ``shrink`` are broadcast against D (items, slices, rows, columns). Without a ``scale`` D is the
        step itself; ``shrink`` multiplies the new weights.
        """
        group, dtype = self.group, self.first.state_dtype
        compiled = self.backend is not None and shrink is None
        if scale is not None and not (compiled and self.rule.is_plain(group)):
            states = {k: v[part.items, :, part.rows] for k, v in self.states.items() if k != "low_bits"}
            D, scale = self.rule.apply(states, D, scale, group), None
        low = self.states["low_bits"][part.items, :, part.rows] if "low_bits" in self.states else None
        weights = [m.canonical(m.p, m.shard)[self.slab, part.rows] for m in self.members[part.items]]
        narrow = weights[0].element_size() < 4
        rate, cautious = group["lr"] * group["weight_decay"], group["control"] == "cautious"
        sure = self.travel.ok is None and ok.device.type == "cpu" and bool(ok.all())
        if sure and not (compiled or self.shares or narrow or shrink is not None):
            decay_and_step(weights, list(D.to(weights[0].dtype).unbind(0)), rate, cautious)
            return None
        old = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
        if compiled:
            new = self.travel.stepped(old, low, D if scale is not None else D.to(dtype), scale, ok, group)
        else:
            # A stack of several is a copy already, whose old values are not needed.
            fresh = len(weights) > 1 and self.travel.dtype is None
            x = join_bf16(old, low) if low is not None else old.to(dtype, copy=not fresh)
            before = None if sure else x.clone()
            decay_and_step([x], [D.to(dtype)], rate, cautious)
            if shrink is not None:
                x.mul_(shrink)
            if before is not None:
                x = torch.where(ok, x, before)
            new = x.to(old.dtype) if narrow and low is None else x
            new = new if low is None else split_bf16(x, low)
        if self.shares:
            return new if self.travel.dtype is None or narrow else (new - old).to(self.travel.dtype)
        torch._foreach_copy_(weights, list(new.unbind(0)))
        return None

    def controlled(self, D: Tensor, scale: Tensor, ok: Tensor, facts: Facts) -> Steps:
        """`advance` for all portions of the bucket's direction D, with a pause until all ranks know the sums.

        ``scale`` and ``ok`` are broadcast against D (items, slices, rows, columns).
        """
        assert facts.sums is not None
        states = {k: v for k, v in self.states.items() if k != "low_bits"}
        steps = torch.where(ok, self.rule.apply(states, D, scale, self.group), 0)
        weights = torch.stack([m.canonical(m.p, m.shard)[self.slab] for m in self.members]).to(steps.dtype)
        pairs = ((weights, weights), (weights, steps), (steps, steps))
        each = [per_matrix(a * b, self.index, len(self.arrival)) for a, b in pairs]
        del weights
        if self.places is None:
            self.places = facts.sums.places([(self.members[i].entry, j) for i, j in self.arrival])
        count = len(self.places)
        if count and self.entry.layout.counted(self.place):
            facts.sums.add(self.places, torch.stack(each, 1)[:count])
        yield None
        grow = shrink = steps.new_ones(1, 1, 1, 1)
        if count:
            sums, shared = facts.sums.values[self.places], facts.sums.nuclear(self.entry.role)
            grow, shrink = (self.spread(x).to(steps) for x in lengths(self.group, sums, shared))
        for part in self.bucket.portions:
            rows = part.rows if grow.shape[2] > 1 else slice(None)
            step = steps[part.items, :, part.rows] * grow[part.items, :, rows]
            good = ok[part.items, :, rows] if ok.ndim else ok
            message = self.advance(part, step, good, shrink=shrink[part.items, :, rows])
            if message is not None:
                self.arrived(part, (yield self.share(part, message)))

    def share(self, part: Portion, message: Tensor) -> Started:
        """Starts sending this rank's shards, or their updates, to ranks with copies: (copies, items, longest)."""
        longest = self.longest[id(part)]
        flat = message.to(self.travel.device).reshape(len(message), -1)
        if flat.shape[1] < longest:
            flat = torch.cat([flat, flat.new_zeros(len(flat), longest - flat.shape[1])], 1)
        assert self.team.copies is not None
        return self.travel.traffic.all_gather(flat, self.team.copies)

    def _portion_of(self, part: Portion, box: Cut3) -> Cut3:
        """A portion's part of a copy's shard, relative to what that copy stores."""
        depth, (top, bottom), across = box
        first, last, _ = part.rows.indices(bottom - top)
        depth = depth if self.slab == slice(None) else (self.slab.start, self.slab.stop)
        return depth, (top + first, top + max(first, last)), across

    def arrived(self, part: Portion, gathered: Tensor) -> None:
        """Writes the results of all copies into the parameters."""
        stored = [m.canonical(m.p) for m in self.members[part.items]]
        ours, theirs = [], []
        if self.axis is not None:
            for w, messages in zip(stored, gathered.unbind(1), strict=True):
                cut = w.unflatten(self.axis, (len(self.boxes), -1)).movedim(self.axis, 0)
                ours.append(cut[:, self.slab, part.rows])
                theirs.append(messages.view(ours[-1].shape))
        else:
            for box, messages in zip(self.boxes, gathered, strict=True):
                place = self._portion_of(part, box)
                for w, message in zip(stored, messages, strict=True):
                    ours.append(w[slices(place)])
                    theirs.append(message[: volume(place)].view(ours[-1].shape))
        if gathered.dtype == self.entry.dtype and not (self.travel.dtype and self.entry.itemsize >= 4):
            torch._foreach_copy_(ours, theirs)
        else:
            torch._foreach_add_(ours, [x.to(ours[0].device, self.entry.dtype) for x in theirs])

    def _rows(self, rows: list[int]) -> Tensor:
        """Rows of owner state as an index on the device, made once: copying it from the host would make a GPU wait."""
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, dtype=torch.int64, device=self.travel.device)
        return self._indices[key]

    def _keep(self, held: dict[str, Tensor], rows: Tensor, after: dict[str, Tensor], ok: Tensor) -> None:
        """Writes the next states of matrices owned here into these rows, if the step takes place and ``ok`` (matrices,)."""
        ok = ok if self.travel.ok is None else ok & self.travel.ok.to(ok.device)
        for key, value in held.items():
            may = ok.view(-1, *[1] * (value.ndim - 1))
            value[rows] = torch.where(may, after[key].to(value.dtype), value[rows])

    def _related(
        self, scale: Tensor, state: dict[str, Tensor], shape: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A rule's scales (matrices,), relative to their early mean if the group's ``scale`` says so, and the next mean."""
        seen = state["nuclear_mean"]
        # A group may switch to another scale between steps.
        if self.group["scale"] == "nuclear_relative":
            scale, seen = relative(scale.double(), seen)
            scale = scale * width_factor(shape, self.group)
        return scale, {"nuclear_mean": seen}

    def _share_nuclear(self, norms: Tensor | None, scale: Tensor, ok: Tensor, facts: Facts) -> None:
        """Adds the scaled nuclear norms of matrices that are owned here to their role's sum."""
        if norms is None:
            raise ConfigError(
                f"the rule {self.group['algorithm']!r} returned no nuclear norms, expected them for scale 'nuclear_shared'"
            )
        assert facts.sums is not None
        facts.sums.add_nuclear(self.entry, torch.where(ok, norms * scale, 0))

    def settle(self) -> None:
        """Restores the states if the step was skipped, and writes back stacked copies of states."""
        for key, old in self._kept.items():
            assert self.travel.ok is not None
            self.states[key].copy_(torch.where(self.travel.ok.to(old.device), self.states[key], old))
        for views, stack in self.loose:
            torch._foreach_copy_(views, list(stack.unbind(0)))


def joined(views: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Tensors of one shape stacked, and whether the stack is a view: it is if they are adjacent in memory."""
    first = views[0]
    if len(views) == 1:
        return first.unsqueeze(0), True
    size, at = first.numel(), first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    together = all(
        v.is_contiguous()
        and v.untyped_storage().data_ptr() == storage
        and v.storage_offset() == at + i * size
        for i, v in enumerate(views)
    )
    if together:
        return first.as_strided((len(views), *first.shape), (size, *first.stride())), True
    return torch.stack(list(views)), False
