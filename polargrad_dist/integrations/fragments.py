"""PolarGrad on parameters of which each rank holds a stretch of elements, somewhere in a flat vector of its own.

What shards parameters so (DeepSpeed's ZeRO) keeps weights and state in flat vectors, and shares the weights itself. Here a
stretch is a layout like every other: momentum where the elements lie, whole matrices at their owners, directions back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polargrad_dist.distributed.layout import Stretches, volume
from polargrad_dist.distributed.plan import Entry, Plan
from polargrad_dist.distributed.teams import Placing
from polargrad_dist.errors import ConfigError
from polargrad_dist.integrations.deepspeed_checks import refuse_owner_state
from polargrad_dist.optim.matrix import rule_of
from polargrad_dist.optim.member import Member, Travel
from polargrad_dist.optim.optimizer import PolarGrad
from polargrad_dist.optim.planning import entry, split_of
from polargrad_dist.optim.world import World

Bounds = tuple[tuple[int, int], ...]
# Each fragment is one matrix already
SPLITS = {"split_sizes": None, "num_heads": None, "flatten": False}
OWN = ("params", "param_names", *SPLITS)


@dataclass(eq=False)
class Fragment:
    """A matrix, or a parameter that is none: its shape, each rank's stretch of its elements, and where this rank's lies.

    flat: this rank's vector, None where it has no element; at: the first of its elements there.
    """

    name: str
    shape: tuple[int, ...]
    bounds: Bounds
    rank: int
    flat: Tensor | None
    at: int

    @property
    def elements(self) -> int:
        """How many are here."""
        first, last = self.bounds[self.rank]
        return last - first

    def of(self, flat: Tensor) -> Tensor:
        """This rank's stretch of a vector like ``flat``; writes through."""
        return flat.detach().narrow(0, self.at, self.elements)


def fragments_of(
    group: Mapping[str, Any], name: str, shape: tuple[int, ...], whole: Fragment
) -> Iterator[Fragment]:
    """The matrices of a parameter, each a stretch of its elements, from the fragment that ``whole`` is of all of it.

    Raises ``ConfigError`` for matrices side by side (splits of a transposed parameter), whose elements are no stretch.
    """
    rule = rule_of(group)
    if not rule.matrices:
        yield whole
        return
    refuse_owner_state(name, group)
    split = split_of(group, name, shape)
    several = len(split.matrices) > 1
    if several and split.transposed and len(split.matrices) > split.stack:
        raise ConfigError(
            f"{name} of shape {shape} holds {len(split.matrices)} matrices side by side, which ZeRO cuts across, expected "
            "matrices one below the other: give parameter_hints() {'split_sizes': None} to step it as one, or use ZeRO "
            "stage 0"
        )
    first = 0
    for i, box in enumerate(split.matrices):
        last = first + volume(box)
        bounds = tuple(
            (min(max(a, first), last) - first, min(max(b, first), last) - first) for a, b in whole.bounds
        )
        here, until = whole.bounds[whole.rank]
        at = whole.at + max(0, min(first, until) - here)
        matrix = f"{name}[{i}]" if several else name
        yield Fragment(matrix, split.stored_shape(i), bounds, whole.rank, whole.flat, at)
        first = last


def fragment_entry(
    group: Mapping[str, Any], number: int, fragment: Fragment, dtype: torch.dtype, ranks: tuple[int, ...]
) -> Entry:
    """What the plan knows of a fragment on these ranks. A tall matrix goes to an owner too: its rows may be cut."""
    whole = torch.empty(fragment.shape, dtype=dtype, device="meta")
    e = entry(group, number, fragment.name, whole, Placing((len(ranks),), (1,), ranks))
    layout = Stretches((e.numel,), (len(ranks),), (0,), None, fragment.bounds)
    return replace(e, layout=layout, split=None if e.split is None else replace(e.split, flattened=True))


def planned(
    groups: Sequence[Mapping[str, Any]], stage: int, ranks: int, comm_dtype: torch.dtype | None
) -> Plan:
    """The plan of the groups that `route` returned under ZeRO stage 1, 2 or 3, on tensors of any device."""
    plan = Plan(ranks, "all_reduced", comm_dtype.itemsize if comm_dtype is not None else None)
    entries = []
    for number, group in enumerate(groups):
        named = list(zip(group["param_names"], group["params"], strict=True))
        start, total = 0, sum(p.numel() for _, p in named)
        # The vectors of a group are of one length, a multiple of two elements.
        part = -(-total // (2 * ranks)) * 2
        for name, p in named:
            n = p.numel()
            first, size = (0, -(-n // ranks)) if stage == 3 else (start, part)
            cuts = [min(max(rank * size - first, 0), n) for rank in range(ranks + 1)]
            whole = Fragment(name, tuple(p.shape), tuple(pairwise(cuts)), 0, None, 0)
            for fragment in fragments_of(group, name, whole.shape, whole):
                entries.append(fragment_entry(group, number, fragment, torch.float32, tuple(range(ranks))))
            start += n
    plan.add(entries)
    return plan


class FragmentWorld(World):
    """A world whose parameters are fragments, computed on devices of ``kind`` wherever their elements lie."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        travel: Travel,
        fragments: Mapping[nn.Parameter, Fragment],
        states: Mapping[Tensor, dict[str, Tensor]],
        kind: str,
    ):
        super().__init__(group, travel, "all_reduced")
        self.fragments, self.states, self.kind = fragments, states, kind

    def placing(self, name: str, p: nn.Parameter) -> Placing:
        group = self.process_group
        return Placing(ranks=(self.rank,) if group is None else tuple(dist.get_process_group_ranks(group)))

    def entry(self, group: dict[str, Any], number: int, name: str, p: nn.Parameter, found: Placing) -> Entry:
        return fragment_entry(group, number, self.fragments[p], p.dtype, found.ranks)

    def computes_on(self, p: nn.Parameter, found: Placing) -> str:
        return self.kind

    def _make_state(self, new: list[Member]) -> None:
        for m in new:
            self.view(m)

    def view(self, m: Member) -> None:
        """Makes a member's state views into the flat one, and its step count that of the vector."""
        fragment = self.fragments[m.p]
        for key in m.rule.states(m.group):
            if fragment.flat is None:
                m.state[key] = torch.zeros(0, dtype=m.state_dtype, device=m.device)
            else:
                m.state[key] = fragment.of(self.states[fragment.flat][key])
        if not m.rule.matrices:
            m.state["step"] = torch.zeros((), dtype=torch.float32, device=m.device)
            if fragment.flat is not None:
                m.state["step"].copy_(self.states[fragment.flat]["step"])


class FragmentPolarGrad(PolarGrad):
    """Steps fragments: group by group a dict of `Rule`'s fields, and the fragments of its parameters.

    ``states`` holds for each flat vector what its group's rule keeps; missing ones are made, as zeros.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Mapping[str, Any], Sequence[Fragment]]],
        states: dict[Tensor, dict[str, Any]],
        kind: str,
        device: torch.device,
        comm_dtype: Any,
        bucket_mb: float,
    ):
        self.fragments: dict[nn.Parameter, Fragment] = {}
        self.states, self._kind = states, kind
        self._stepped: set[int] = set()
        self._wanted: frozenset[int] = frozenset()
        given = []
        for group, fragments in groups:
            named = []
            for fragment in fragments:
                flat = torch.zeros(0, device=device) if fragment.flat is None else fragment.of(fragment.flat)
                p = nn.Parameter(flat)
                self.fragments[p] = fragment
                named.append((fragment.name, p))
                if fragment.flat is not None:
                    make_state(group, fragment.flat, states[fragment.flat])
            kept = {key: value for key, value in group.items() if key not in OWN}
            given.append(kept | SPLITS | {"params": named})
        super().__init__(given, comm_dtype=comm_dtype, bucket_mb=bucket_mb)

    def _new_world(self, process_group: dist.ProcessGroup | None) -> FragmentWorld:
        if process_group is None and dist.is_initialized() and dist.get_world_size() > 1:
            process_group = dist.group.WORLD
        return FragmentWorld(process_group, self._travel, self.fragments, self.states, self._kind)

    def take(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes up what may have changed in the groups that these were made of: learning rates and such."""
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k in mine and k not in OWN})

    @torch.no_grad()
    def step_vectors(self, vectors: Iterable[Tensor]) -> None:
        """Steps the matrices that lie in these vectors, by the vectors' gradients; every rank calls it for the same ones."""
        live = {id(vector) for vector in vectors}
        if live & self._stepped:
            self._stepped, self._wanted = set(), frozenset()
        earlier = self._facts if self._stepped else None
        self._stepped |= live
        self._keep = self._wanted
        self.follow()
        for p, fragment in self.fragments.items():
            flat = fragment.flat
            p.grad = (
                fragment.of(flat.grad)
                if flat is not None and id(flat) in live and flat.grad is not None
                else None
            )
        try:
            super().step()
        finally:
            for p in self.fragments:
                p.grad = None
        self._count(live)
        if earlier is not None:
            self._facts.absorb(earlier)

    def keep_next(self, members: Iterable[Member]) -> None:
        """Of the next step over all vectors, however many calls it takes."""
        super().keep_next(members)
        self._wanted = self._keep
        self._stepped.clear()

    def follow(self, *, reload: bool = False) -> None:
        """Looks where weights and state lie now: who loads or offloads puts other memory in their place."""
        world, moved = self._world, reload
        assert isinstance(world, FragmentWorld)
        for m in self.works:
            fragment = self.fragments[m.p]
            if fragment.flat is None:
                continue
            if (here := fragment.of(fragment.flat)).data_ptr() != m.p.data_ptr():
                m.p.data, moved = here, True
            states = self.states[fragment.flat]
            make_state(m.group, fragment.flat, states)
            apart = any(
                fragment.of(states[k]).data_ptr() != m.state[k].data_ptr() for k in m.rule.states(m.group)
            )
            if apart or reload:
                world.view(m)
                moved = True
        if moved:
            world.schedules.clear()

    def _count(self, live: set[int]) -> None:
        """Keeps the step count of elementwise rules with the vector, where it is saved."""
        for m in self.works:
            flat = self.fragments[m.p].flat
            if flat is not None and id(flat) in live and "step" in m.state:
                self.states[flat]["step"].copy_(m.state["step"])
                live.discard(id(flat))


def make_state(group: Mapping[str, Any], flat: Tensor, states: dict[str, Any]) -> None:
    """What a group's rule keeps for a vector, as zeros where it is not there; elementwise rules count their steps too."""
    rule = rule_of(group)
    for key in rule.states(group):
        if key not in states:
            states[key] = torch.zeros_like(flat, requires_grad=False)
    if not rule.matrices and "step" not in states:
        states["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
