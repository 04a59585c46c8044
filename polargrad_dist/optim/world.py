"""The parameters of all ranks with their owners: this rank's part of each, its state, and the buckets of a step."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polargrad_dist.distributed.plan import Entry, Plan, in_order, index_of, sum_rows
from polargrad_dist.distributed.reducer import Reduced, ShardReducer
from polargrad_dist.distributed.schedule import in_buckets
from polargrad_dist.distributed.schedule import in_order as resumed
from polargrad_dist.distributed.teams import Groups, Placing, Team, placing, widest
from polargrad_dist.distributed.transport import Agreement
from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.batch import Batch
from polargrad_dist.optim.bucket import KINDS, Schedule
from polargrad_dist.optim.checks import refuse_zero
from polargrad_dist.optim.matrix import kept_states
from polargrad_dist.optim.member import Member, Travel
from polargrad_dist.optim.planning import entry

# The group's number, the group, the parameter's name, the parameter.
Given = tuple[int, dict[str, Any], str, torch.nn.Parameter]


class World:
    """Adds parameters group by group; all ranks call every method."""

    def __init__(self, process_group: dist.ProcessGroup | None, travel: Travel, gradients: str):
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.process_group, self.travel, self.gradients = process_group, travel, gradients
        self.members: list[Member] = []
        self.entries: list[Entry] = []
        # Ids of the parameters of all groups, in order, once they are members. Kept here because Lightning's wrapper of an
        # optimizer has attributes of its own, and adds groups by its own methods.
        self.placed: list[int] = []
        self.agreement: Agreement | None = None
        self.group: dist.ProcessGroup | None = None
        self.plan = Plan(1, gradients, None if travel.dtype is None else travel.dtype.itemsize)
        self.meshes = False
        # The entry of each name that counts in norms and sums.
        self.counts: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._groups = Groups()
        self.sum_rows: dict[tuple[Any, int], int] = {}
        # Keyed by which parameters have a gradient on some rank.
        self.schedules: dict[tuple[bool, ...], Schedule] = {}

    @property
    def rank(self) -> int:
        """This rank, as plans count ranks."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def add(self, given: list[Given], state: Any) -> None:
        """Assigns owners to further parameters and creates their state in ``state``. Earlier owners do not change."""
        found = {id(p): self.placing(name, p) for _, _, name, p in given}
        mine = [self.entry(group, number, name, p, found[id(p)]) for number, group, name, p in given]
        self._meet([found[id(p)] for *_, p in given], [p for *_, p in given])
        meshes = torch.tensor(
            [any(f.mesh is not None for f in found.values())], dtype=torch.int32, device="cpu"
        )
        self.meshes |= bool(self.agreement.largest(meshes) if self.agreement else meshes)
        merged = self._merged(mine)
        numbers = {e.key: len(self.entries) + i for i, e in enumerate(merged)}
        teams = self._make_groups(merged)
        new = []
        for e, (number, group, _, p) in zip(mine, given, strict=True):
            if e.key in teams:
                place, whole, copies = teams[e.key]
                team = Team(found[id(p)], place, whole, copies, self.travel.device.type)
                new.append(Member(numbers[e.key], e, p, group, team, {}, number))
        # What may be refused comes first, so that nothing is left behind.
        refuse_zero(new, merged, self.agreement)
        self.plan.add(merged)
        self.entries += merged
        self.sum_rows = sum_rows(self.entries)
        # Experts on several meshes are copies of each other: their norm counts once.
        for e in merged:
            self.counts.setdefault(e.name, e.key)
        for m in new:
            m.state = state[m.p]
        # Tensors made in inference mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._make_state(new)
        self.members += new
        self.schedules.clear()
        if self.gradients == "reduce_scatter":
            self._reduce()

    def placing(self, name: str, p: torch.nn.Parameter) -> Placing:
        """The ranks that store a parameter, and how it is sharded or replicated."""
        return placing(name, p, self.process_group)

    def entry(
        self, group: dict[str, Any], number: int, name: str, p: torch.nn.Parameter, found: Placing
    ) -> Entry:
        """The plan's entry for a parameter. Raises ``ConfigError`` if its group's rule cannot step it."""
        return entry(group, number, name, p, found)

    def computes_on(self, p: torch.nn.Parameter, found: Placing) -> str:
        """The kind of device that computes the matrices of a parameter."""
        return p.device.type if found.mesh is None else found.mesh.device_type

    def _meet(self, found: list[Placing], params: list[torch.nn.Parameter]) -> None:
        """Determines the ranks that step together, and the device that computes."""
        for placed in found:
            self._groups.learn(placed, self.process_group)
        ranks = widest(found, self.process_group)
        kinds = {self.computes_on(p, f) for f, p in zip(found, params, strict=True)}
        if self.members:
            kinds.add(self.travel.device.type)
        if len(kinds) > 1:
            raise ConfigError(
                f"parameters are on {' and '.join(sorted(kinds))}, expected all on one kind of device"
            )
        kind = kinds.pop()
        on = next((p.device for p in params if p.device.type == kind), None)
        self.travel.device = torch.device(kind, torch.cuda.current_device()) if on is None else on
        if len(ranks) > 1 and self.agreement is None:
            self.group = self._groups.of(ranks)
            assert self.group is not None
            self.agreement = Agreement(self.group, self.travel.device)
        self.plan.world = max(self.plan.world, len(ranks))
        self.plan.ranks = ranks

    def _merged(self, mine: list[Entry]) -> list[Entry]:
        """The parameters of all ranks, each once, in an order that is the same everywhere."""
        if self.agreement is None:
            return mine
        facts = "\n".join(repr((e.key, e.shape, e.rule, e.group, e.dtype, e.layout, e.split)) for e in mine)
        digest = torch.tensor([len(mine), zlib.crc32(facts.encode())], dtype=torch.int64, device="cpu")
        alike = bool(self.agreement.same(digest).all())
        if alike:
            return mine
        known: dict[Any, Entry] = {}
        seen: dict[Any, set[int]] = {}
        ranks = dist.get_process_group_ranks(self.group)
        for rank, entries in zip(ranks, self.agreement.gather_objects(mine), strict=True):
            for e in entries:
                first = known.setdefault(e.key, e)
                seen.setdefault(e.key, set()).add(rank)
                here, there = ((x.shape, x.rule, x.dtype, x.layout) for x in (first, e))
                if here != there:
                    self._refuse_difference()
        if any(not set(e.ranks) <= seen[e.key] for e in known.values()):
            self._refuse_difference()
        mine[:] = [known[e.key] for e in mine]
        return list(known.values())

    def _refuse_difference(self) -> None:
        raise ConfigError(
            "parameters, shapes or rules differ between ranks, expected the same on all ranks that store a parameter: "
            "build the same model and groups on every rank. Where ranks hold different models (pipeline stages), name each "
            "stage's ranks in process_group, and all of them in norm_group"
        )

    def _make_groups(self, merged: list[Entry]) -> dict[Any, tuple[int, Any, Any]]:
        """For each parameter stored here: this rank's place, the group of all its ranks, and that of the ranks with copies.

        Creates groups that do not exist yet, on all their ranks in one order.
        """
        teams: dict[Any, tuple[int, Any, Any]] = {}
        for e in merged:
            if (place := index_of(e.ranks).get(self.rank)) is not None:
                first = place - place % e.layout.copies
                shared = e.layout.cut is not None
                copies = self._groups.of(e.ranks[first : first + e.layout.copies]) if shared else None
                teams[e.key] = place, self._groups.of(e.ranks), copies
        return teams

    def _make_state(self, new: list[Member]) -> None:
        """Creates every state as zeros; those of one bucket are adjacent in memory, so a step stacks them as a view."""
        entries = [m.entry for m in new]
        for bucket in in_buckets(entries, [True] * len(entries), self.travel.limit):
            if bucket.items[0].first:
                # A later slice of a stack: the stack has one state.
                continue
            members = [new[item.entry] for item in bucket.items]
            first = members[0]
            names = {key: first.state_dtype for key in first.rule.states(first.group)}
            shapes = [[b - a for a, b in m.entry.layout.shards[m.team.place]] for m in members]
            sizes = list(map(math.prod, shapes))
            for key, dtype in names.items():
                flat = torch.zeros(sum(sizes), dtype=dtype, device=first.device)
                for m, here, shape in zip(members, flat.split(sizes), shapes, strict=True):
                    m.state[key] = m.team.state(here.view(shape), m.entry.layout, m.p)
            if first.entry.dtype == torch.bfloat16:
                flat = torch.zeros(2 * sum(sizes), dtype=torch.uint8, device=first.device)
                for m, here, shape in zip(
                    members, flat.split([2 * size for size in sizes]), shapes, strict=True
                ):
                    m.state["low_bits"] = m.team.state(here.view(*shape, 2), m.entry.layout, m.p, (2,))
            if not first.rule.matrices:
                for m in members:
                    # Never in a default dtype such as bf16, which cannot count beyond 256.
                    m.state["step"] = torch.zeros((), dtype=torch.float32, device=m.device)
        self._make_owner_state(new)

    def _make_owner_state(self, new: list[Member]) -> None:
        by_name = {m.entry.key: m for m in new}
        for (_, shape, _), matrices in in_order(m.entry for m in new).items():
            home = by_name[matrices[0][0].key]
            world = home.entry.layout.world
            each = -(-len(matrices) // world)
            start = home.team.order.index(home.team.place) * each if home.team.group is not None else 0
            here = max(0, min(len(matrices) - start, each))
            m, n = shape
            split = home.entry.split
            assert split is not None
            several = len({split.stored_shape(i) for i in range(len(split.matrices))}) > 1
            names = {}
            for key, shape_of in kept_states(home.group).items():
                zeros = torch.zeros(here, *shape_of(m, n), dtype=home.state_dtype, device=self.travel.device)
                names[key] = f"{key}_{m}x{n}" if several else key
                home.state[names[key]] = home.team.stacked(zeros, len(matrices))
            for k, (e, i) in enumerate(matrices):
                member = by_name[e.key]
                member.owner_homes[shape] = home, names
                if start <= k < start + here:
                    member.owner_rows[i] = k - start

    def _reduce(self) -> None:
        if self.travel.reducer is not None:
            raise ConfigError(
                "a parameter group was added with gradients='reduce_scatter', expected all groups at construction: build a "
                "new optimizer"
            )
        group = self.members[0].team.group
        copies = self.members[0].team.order if group is not None else [0]
        reduced = [Reduced(m.p, m.entry, m.team.place, copies) for m in self.members]
        self.travel.reducer = ShardReducer(reduced, group, self.travel.traffic, self.travel.limit)

    def schedule(self, present: tuple[bool, ...]) -> Schedule:
        """This rank's buckets of the parameters that have a gradient on some rank; cached in `schedules`."""
        if len(self.schedules) >= 8:
            self.schedules.pop(next(iter(self.schedules)))
        here = {m.index: m for m in self.members}
        batches: dict[int, Batch] = {}
        buckets = in_buckets(self.entries, present, self.travel.limit)
        for number, bucket in enumerate(buckets):
            members = [here[item.entry] for item in bucket.items if item.entry in here]
            if len(members) == len(bucket.items):
                batches[number] = KINDS[bucket.like.kind](bucket, members, self.travel)
        where = {number: i for i, number in enumerate(batches)}
        stages = zip(*[b.stages for b in buckets], strict=True) if buckets else [(), ()]
        orders = [[where[n] for n in resumed(counts) if n in where] for counts in stages]
        return self.schedules.setdefault(present, Schedule(list(batches.values()), orders))

    def counted(self, member: Member) -> bool:
        """Whether this rank counts the elements of its optimizer shard in norms."""
        e = member.entry
        return self.counts[e.name] == e.key and e.layout.counted(member.team.place)

    def digests(self) -> Tensor:
        """For every parameter, sums over the bits of its weights and of its gradient here; 0 if not stored here."""
        out = torch.zeros(2, len(self.entries), dtype=torch.int64, device="cpu")
        for m in self.members:
            if m.entry.layout.copies > 1:
                out[0, m.index] = digest(m.canonical(m.p))
                if m.p.grad is not None:
                    grad = m.p.grad
                    out[1, m.index] = digest(grad.to_local() if hasattr(grad, "to_local") else grad)
        return out

    def differing(self) -> tuple[int, str] | None:
        """(0 for weights or 1 for gradients, name) of the first parameter whose copies differ. A collective."""
        assert self.agreement is not None
        seen = self.agreement.gather(self.digests())
        ranks = index_of(tuple(dist.get_process_group_ranks(self.group)))
        for what in (0, 1):
            for number, e in enumerate(self.entries):
                if (copies := e.layout.copies) > 1:
                    values = seen[[ranks[rank] for rank in e.ranks], what, number].view(-1, copies)
                    if bool((values != values[:, :1]).any()):
                        return what, e.name
        return None


def digest(x: Tensor) -> int:
    """A sum over the bits of a tensor, which does not depend on the order of summation."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return int(x.view(words).sum(dtype=torch.int64)) % (1 << 62)
