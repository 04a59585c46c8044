"""What the planner needs to know about the optimizer's groups: each parameter's kind, layout and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from polargrad_dist.distributed.layout import Split, cuttable, laid_out
from polargrad_dist.distributed.plan import SMALL, Entry, Plan
from polargrad_dist.distributed.teams import Placing
from polargrad_dist.optim.matrix import POLYNOMIAL, kept_states, rule_of
from polargrad_dist.polar import root_cost


def entry(
    group: Mapping[str, Any],
    number: int,
    name: str,
    p: torch.Tensor,
    found: Placing,
    device_type: str | None = None,
) -> Entry:
    """The plan's entry for a parameter of group ``number`` with placement ``found``; owners are not assigned yet.

    device_type: device that computes its matrices and determines their costs; None for the parameter's own.
    """
    device = device_type or (found.mesh.device_type if found.mesh is not None else p.device.type)
    rule, shape = rule_of(group), tuple(p.shape)
    common = (name, shape, number, group["role"], rule.describe(group), float(group["lr"]))
    states, where = len(rule.states(group)), (found.sizes, found.cuts)
    if not rule.matrices:
        among = tuple(range(min(2, len(shape)))) if math.prod(shape) > SMALL else ()
        return Entry(*common, "elementwise", p.dtype, states, laid_out(shape, *where, among), found.ranks)
    split = split_of(group, name, shape)
    sizes = [split.stored_shape(i) for i in range(len(split.matrices))]
    owner_states = kept_states(group)
    kept = {
        size: sum(math.prod(shape_of(*size)) for shape_of in owner_states.values()) for size in set(sizes)
    }
    more: dict[str, Any] = {
        "in_order": bool(owner_states),
        "pauses": rule.pauses(group),
        "kept": tuple(kept[size] for size in sizes) if owner_states else (),
    }
    if rule.tall(group, split, p.dtype) and all(cut in (0, None) for cut in found.cuts):
        layout, costs = (
            laid_out(shape, *where, (0,)),
            (root_cost(split.cols, group["oracle"], group["steps"], device_type=device),),
        )
        more |= {"bounded": rule.bounded(group), "centred": group["center_rows"]}
        return Entry(*common, "tall", p.dtype, states, layout, found.ranks, split, costs, **more)
    layout = laid_out(shape, *where, cuttable(shape, group["flatten"]))
    by_size = {size: rule.cost_on(device, size, group) for size in set(sizes)}
    costs = tuple(by_size[size] for size in sizes)
    more["wide"] = group["oracle"] not in POLYNOMIAL
    return Entry(*common, "owner", p.dtype, states, layout, found.ranks, split, costs, **more)


def split_of(group: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Split:
    """The matrices in a parameter, according to its group."""
    return Split.of(
        name, shape, group["split_sizes"], group["num_heads"], group["flatten"], group["transposed"]
    )


def plan_for(
    groups: Iterable[Mapping[str, Any]],
    *,
    replicas: int = 1,
    shards: int = 1,
    gradients: str = "all_reduced",
    comm_dtype: torch.dtype | None = None,
    device_type: str = "cpu",
) -> Plan:
    """The plan of the groups that `route` returned, on tensors of any device, meta included.

    Matrices are assigned by their costs on ``device_type``. ``shards`` ranks hold the rows of one replica, sharded as by
    FSDP2; there are ``replicas`` replicas.
    """
    plan = Plan(replicas * shards, gradients, comm_dtype.itemsize if comm_dtype is not None else None)
    dims = [(size, cut) for size, cut in ((shards, 0), (replicas, None)) if size > 1]
    ranks = tuple(r * shards + s for s in range(shards) for r in range(replicas))
    found = Placing(tuple(size for size, _ in dims), tuple(cut for _, cut in dims), ranks)
    items = [(group, n, name, p) for n, group in enumerate(groups)
             for name, p in zip(group["param_names"], group["params"], strict=True)]  # fmt: skip
    plan.add([entry(*item, found, device_type) for item in items])
    return plan
