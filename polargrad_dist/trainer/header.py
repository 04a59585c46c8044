"""A description of the run, made at every start: on the console, in ``run.json`` and in the report.

``run.json`` holds the description of the newest start and, under ``starts``, the time, place and command of each start.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polargrad_dist.errors import ConfigError
from polargrad_dist.optim.matrix import rule_of
from polargrad_dist.optim.rules import PARTS, ROLES, OptimizerConfig
from polargrad_dist.trainer import rundir
from polargrad_dist.trainer.config import TrainerConfig
from polargrad_dist.trainer.console import COLUMNS, duration, wrapped
from polargrad_dist.trainer.world import World
from polargrad_dist.words import counted

PACKAGES = ("polargrad-dist", "torch", "transformers", "numpy")
FILE = "run.json"


def facts_of(
    config: TrainerConfig,
    world: World,
    model: nn.Module,
    optimizer: Any,
    data: Any,
    configuration: dict[str, Any],
    run_id: str,
    first: int,
    expected: dict[str, Any],
) -> dict[str, Any]:
    """The description of a start, JSON-able, for rank 0; what is not known is left out.

    optimizer: a `PolarGrad`, whose groups have a ``role``. data: may have ``describe()``. first: the step that the run goes
    on from. expected: as `estimate.expected` returns it. All ranks call it together.
    """
    hosts = world.gather((socket.gethostname(), device_name(world.device)))
    training = {
        "steps": config.steps,
        "first": first,
        "tokens_per_step": config.tokens_per_step,
        "tokens": config.steps * config.tokens_per_step,
        "global_batch": config.global_batch,
        "micro_batch": config.micro_batch,
        "accumulation": config.accumulation(world.size),
        "sequence_length": config.sequence_length,
        "precision": config.precision,
        "compile": config.compile,
    }
    described = data.describe() if hasattr(data, "describe") else {}
    if tokens := described.get("train_tokens"):
        training["epochs"] = training["tokens"] / tokens
    return {
        "run": {"id": run_id, "dir": str(Path(config.run_dir).resolve())},
        "model": {
            "name": _model(model, configuration),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "roles": _roles(optimizer, configuration.get("optimizer")),
        "training": training,
        "ranks": {
            "world": world.size,
            "strategy": config.strategy.name if world.size > 1 else "one rank",
            "hosts": sorted({host for host, _ in hosts}),
            "devices": _counted([device for _, device in hosts]),
        },
        "data": described | _source(configuration.get("data")),
        "expected": expected,
        "machine": machine(),
        "versions": versions(),
        "commit": commit() if world.is_main else None,
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
    }


def header(facts: dict[str, Any]) -> str:
    """The description on one screen, in lines of at most 120 characters."""
    training, ranks, data = facts["training"], facts["ranks"], facts["data"]
    steps = f"{counted(training['steps'], 'step')} x {counted(training['tokens_per_step'], 'token')}"
    steps += f" = {_short(training['tokens'])}"
    if training["first"]:
        steps += f", resumed at step {training['first']:,}"
    epochs = f", {training['epochs']:.2g} epochs" if "epochs" in training else ""
    batch = f"{counted(training['global_batch'], 'sequence')} of {counted(training['sequence_length'], 'token')}: "
    batch += f"{counted(ranks['world'], 'rank')} x "
    batch += f"{training['accumulation']} x {training['micro_batch']}"
    rows = [("run", f"{facts['run']['dir']} ({facts['run']['id']})")]
    rows.append(("model", f"{facts['model']['name']}, {counted(facts['model']['parameters'], 'parameter')}"))
    for role, one in facts["roles"].items():
        rows.append((f"  {role}", f"{one['parameters']:>13,}  {one['rule']}"))
    rows += [("steps", steps + epochs), ("batch", batch)]
    if data:
        rows.append(("data", describe_data(data)))
    compiled = ", compiled" if training["compile"] else ""
    rows.append(("ranks", f"{ranks['strategy']}, {training['precision']}{compiled}, on {_devices(ranks)}"))
    if facts.get("expected"):
        rows.append(("expected", describe_expected(facts["expected"])))
    rows.append(("code", describe_code(facts)))
    width = max(len(name) for name, _ in rows)
    lines: list[str] = []
    for name, text in rows:
        lines += wrapped(f"{name:<{width}}  {text}", " " * (width + 2))
    assert all(len(line) <= COLUMNS for line in lines)
    return "\n".join(lines).replace("\xa0", " ")


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes ``run.json`` of a run directory; its earlier starts and notes are kept.

    Raises ``ConfigError`` if it cannot be written.
    """
    known = read_facts(folder)
    start = {
        "time": round(time.time(), 3),
        "step": facts["training"]["first"],
        "command": facts["command"],
        "commit": facts["commit"],
        "world": facts["ranks"]["world"],
        "devices": facts["ranks"]["devices"],
    }
    starts = [one for one in known.get("starts", ()) if isinstance(one, dict)]
    _write(folder, known | facts | {"starts": [*starts, start]})


def note(folder: Path, **more: Any) -> None:
    """Adds facts that are measured later to ``run.json``, such as the loss of a bigram model."""
    _write(folder, read_facts(folder) | more)


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``; empty if it is missing or unreadable."""
    try:
        known = json.loads((folder / FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(folder: Path, facts: dict[str, Any]) -> None:
    try:
        rundir.write(folder / FILE, json.dumps(facts, indent=1, default=str) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{folder / FILE} cannot be written ({error.strerror}): make it writable, or choose another trainer.run_dir"
        ) from error


def describe_data(data: dict[str, Any]) -> str:
    parts = [str(data[name]) for name in ("source", "tokenizer") if data.get(name)]
    if data.get("train_tokens"):
        parts.append(counted(data["train_tokens"], "training token"))
    if data.get("validation_targets"):
        parts.append(counted(data["validation_targets"], "validation target"))
    else:
        parts.append("no validation")
    if data.get("vocab_size"):
        parts.append(f"vocabulary {data['vocab_size']:,}")
    return ", ".join(parts)


def describe_expected(expected: dict[str, Any]) -> str:
    """Memory and time that a known GPU is expected to need, in a few words."""
    total, available = expected["memory"].get("total"), expected["available"]
    parts = ["memory not known"]
    if total is not None:
        left = available - total
        verdict = f"{left / 2**30:.1f} GiB left" if left >= 0 else f"{-left / 2**30:.1f} GiB too much"
        parts = [f"{total / 2**30:.1f} of {available / 2**30:.1f} GiB per rank ({verdict})"]
    if "seconds_per_step" in expected:
        parts += [
            f"{1e3 * expected['seconds_per_step']:,.0f} ms per step",
            f"{duration(expected['seconds'])} for the whole run",
        ]
    return f"{', '.join(parts)} on {expected['device']}, estimated"


def describe_code(facts: dict[str, Any]) -> str:
    named = [f"{name}\xa0{version}" for name, version in facts["versions"].items()]
    return ", ".join(([f"commit {facts['commit']}"] if facts.get("commit") else []) + named)


def describe_rule(group: dict[str, Any]) -> str:
    """A parameter group's rule in short, such as ``polar, lr 0.02, momentum_first 0.95 nesterov, scale muon``."""
    words = [f"{group['algorithm']}, lr {group['lr']:g}"]
    if group["algorithm"] == "adamw":
        words.append("betas {} {}".format(*group["betas"]))
    else:
        ahead = " nesterov" if group.get("nesterov") else ""
        momentum = group["momentum"] + (f" {group['beta']:g}" if group["momentum"] != "none" else "")
        words += [momentum + ahead, f"scale {group['scale']}"]
        count = f" x {group['steps']}" if group.get("steps") else ""
        words.append(f"oracle {group['oracle']}{count}")
        if group.get("spectrum", "polar") != "polar":
            words.append(group["spectrum"])
        parts = {name: group.get(name, nothing) for name, nothing in PARTS.items()}
        words += [_part(name, value) for name, value in parts.items() if value != PARTS[name]]
        words += [
            _part(name, group[name]) for name in getattr(rule_of(group), "options", ()) if name in group
        ]
    if group.get("weight_decay"):
        words.append(f"decay {group['weight_decay']:g}")
    return ", ".join(words)


def _part(name: str, value: Any) -> str:
    return name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _roles(optimizer: Any, asked: Any) -> dict[str, dict[str, Any]]:
    """Parameters and rule of each role, largest first; groups of one role with the same rule are merged.

    asked: the configuration's optimizer section; roles with their default rule are marked as default.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        role, rule = group.get("role") or "parameters", describe_rule(group)
        rule += " (default)" if isinstance(asked, dict) and is_default(role, asked) else ""
        name = role if found.get(role, {"rule": rule})["rule"] == rule else f"{role}: {rule}"
        one = found.setdefault(name, {"parameters": 0, "rule": rule, "lr": float(group["lr"])})
        one["parameters"] += sum(p.numel() for p in group["params"])
    return dict(sorted(found.items(), key=lambda item: -item[1]["parameters"]))


def is_default(role: str, asked: dict[str, Any]) -> bool:
    """Whether an optimizer section gives a role the default rule of `OptimizerConfig`."""
    if role not in ROLES:
        return False
    own = asked.get(role) or asked.get("embed")
    return bool(json.loads(json.dumps(asdict(OptimizerConfig().rule(role)))) == json.loads(json.dumps(own)))


def _model(model: nn.Module, configuration: dict[str, Any]) -> str:
    asked = configuration.get("model")
    if not isinstance(asked, dict) or not asked.get("architecture"):
        return type(model).__name__
    config = getattr(model, "config", None)
    parts = [str(asked["architecture"])]
    for key in ("layers", "width", "heads"):
        value = getattr(config, key, None) or asked.get(key)
        if value is not None:
            parts.append(f"width {value}" if key == "width" else counted(value, key[:-1]))
    return ", ".join(parts)


def _source(data: Any) -> dict[str, Any]:
    """The data source of a configuration's data section, in short."""
    if not isinstance(data, dict):
        return {}
    if data.get("sources"):
        return {"source": f"mixture of {len(data['sources'])}"}
    if data.get("source") == "hub" and isinstance(data.get("hub"), dict):
        return {"source": "/".join(str(data["hub"][k]) for k in ("name", "subset") if data["hub"].get(k))}
    if data.get("paths"):
        more = f" and {len(data['paths']) - 1} more" if len(data["paths"]) > 1 else ""
        return {"source": f"{data['paths'][0]}{more}"}
    return {"source": str(data["source"])} if data.get("source") else {}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Cores available to this process, GiB of memory, threads of torch, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
    }
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that affect results, and of CUDA."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The git commit of the program, with "+changes" if files differ from it; None outside git."""
    where = Path(sys.argv[0]).resolve().parent if sys.argv and sys.argv[0] else Path.cwd()

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(where), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "-s", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _counted(names: list[str]) -> list[str]:
    """Each name once, with its count: ``8 x H100``."""
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def _devices(ranks: dict[str, Any]) -> str:
    hosts = ranks["hosts"]
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts ({hosts[0]}, …)"
    return f"{', '.join(ranks['devices'])}, {where}"


def _short(count: float) -> str:
    """A count in few characters, as 1.31B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"
