"""Evaluates a checkpoint: `python -m tools.evaluate RUN_OR_CHECKPOINT [--text NAME=PATH …] [--tasks hellaswag,…]`.

By default: loss and bits per byte of the run's own validation set. ``--text`` evaluates any text or prepared folder,
``--tasks`` runs the LM evaluation harness, ``--hellaswag`` a local file. ``--tasks`` also takes a folder that Transformers
loads.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.corpora import validation_corpus
from data.dataset import ValidationMaker
from polargrad_dist.errors import ConfigError
from polargrad_dist.trainer.choices import read_questions, score
from polargrad_dist.trainer.cli import run as run_main
from polargrad_dist.trainer.console import quiet
from tools import harness
from tools.arguments import Arguments
from tools.runs import Run, load_run


def main(args: list[str] | None = None) -> int:
    """Runs the command with ``args``, by default those of the process."""
    parser = Arguments(
        "Evaluate a checkpoint.",
        "one run: a text is --text NAME=PATH, a task of the harness --tasks NAME, a checkpoint --step N",
        {
            **dict.fromkeys(("data", "file", "files", "path", "paths"), "--text NAME=PATH"),
            **dict.fromkeys(("batch", "bs", "micro_batch"), "--batch_size"),
            **dict.fromkeys(("num_fewshot", "fewshot"), "--shots"),
            **dict.fromkeys(("output", "out", "output_path"), "--json FILE"),
            **dict.fromkeys(("seq_len", "length", "context"), "--sequence_length"),
        },
    )
    parser.add_argument(
        "run", help="a run directory, one of its checkpoints, or (for --tasks) an exported folder"
    )
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to load; default: the newest valid one"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="text files, globs or a prepared folder to evaluate; may be given several times",
    )
    parser.add_argument("--sequence_length", type=int, default=None, help="tokens; default: as in training")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per forward pass")
    parser.add_argument("--cache", default="cache", help="folder for the tokens of --text")
    parser.add_argument("--hellaswag", default=None, metavar="FILE", help="JSON lines in HellaSwag's format")
    parser.add_argument(
        "--tasks", default=None, help="tasks of the LM evaluation harness, separated by commas"
    )
    parser.add_argument(
        "--include", type=Path, default=None, help="folder of your own tasks, in the harness's format"
    )
    parser.add_argument(
        "--limit", type=int, default=None, help="questions of --hellaswag and documents of each task"
    )
    parser.add_argument(
        "--shots", type=int, default=None, help="examples before each question; default: the task's"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the modelling code of an exported folder"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="also write the figures there"
    )
    options = parser.read(args)
    for name in ("batch_size", "sequence_length", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, expected a whole number >= 1")
    if options.include is not None and (options.tasks is None or not options.include.is_dir()):
        raise ConfigError(f"--include is {options.include}, expected a folder of tasks, beside --tasks")
    if options.sequence_length is not None and not options.text:
        raise ConfigError(
            f"--sequence_length is {options.sequence_length}, which is the length of --text alone: add --text NAME=PATH, or "
            "leave it out"
        )
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(
            f"--json is {options.json}, whose folder does not exist: make it, or choose another"
        )
    found = evaluate(options)
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The requested results: ``validation``, ``hellaswag`` and ``tasks``, each by name."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and device.type != "cuda":
        raise ConfigError("--device is 'cuda', but torch sees no GPU: set it to auto or cpu")
    tasks = [task for task in (options.tasks or "").split(",") if task]
    folder = Path(options.run)
    if (folder / "config.json").is_file():
        if options.text or options.hellaswag or options.step is not None or not tasks:
            raise ConfigError(
                f"{folder} is an exported folder, expected --tasks alone: name the run directory for the other options"
            )
        model = harness.of_export(folder, device, options.batch_size, options.trust_remote_code)
        return {"tasks": harness.run_tasks(model, tasks, **_task_options(options))}
    run = load_run(folder, step=options.step)
    run.model.to(device)
    found: dict[str, Any] = {"step": run.step}
    if options.text or not (tasks or options.hellaswag):
        found["validation"] = validation(run, options, device)
    if options.hellaswag:
        found["hellaswag"] = hellaswag(run, options.hellaswag, options.limit, device)
    if tasks:
        model = harness.of_run(run, device, options.batch_size)
        found["tasks"] = harness.run_tasks(model, tasks, **_task_options(options))
    return found


def _task_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"include": options.include, "limit": options.limit, "shots": options.shots}


def validation(run: Run, options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Loss in nats per token and, where the text is known, bits per byte, of the given texts or of the run's own sets."""
    trained = run.checkpoint.manifest.configuration.get("trainer", {})
    longest = run.model.max_sequence_length
    length = options.sequence_length or int(trained.get("sequence_length", longest))
    if length > longest:
        raise ConfigError(
            f"--sequence_length is {length}, but the run's model takes at most {longest} tokens: lower it"
        )
    make = ValidationMaker(length, options.batch_size, 0, 1, None)
    if not options.text:
        data = run.data
        if data.validation is None:
            raise ConfigError(f"{run.folder} has no validation set, expected one or --text NAME=PATH")
        sets = {"validation": data.validation, **data.validations}
        return {name: mean_loss(run, found, device) for name, found in sets.items()}
    out = {}
    for name, path in named(options.text).items():
        config = DataConfig(source="files", cache=options.cache)
        corpus = validation_corpus(name, [path], config, run.tokenizer, quiet)
        found = make.of(corpus.validation)
        if found is None:
            raise ConfigError(f"--text {name}: {path} holds fewer than two tokens, expected text")
        out[name] = mean_loss(run, found, device)
    return out


def named(texts: list[str]) -> dict[str, str]:
    """The path of each ``NAME=PATH``. Raises ``ConfigError`` for what is none, and for a name given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise ConfigError(f"--text is {text!r}, expected NAME=PATH")
        if name in found:
            raise ConfigError(
                f"--text names two texts {name!r} ({found[name]} and {path}): give each a name of its own"
            )
        found[name] = path
    return found


@torch.no_grad()
def mean_loss(run: Run, tokens: Any, device: torch.device) -> dict[str, float]:
    """The mean over every target of a validation set."""
    total, count = 0.0, 0
    for inputs, targets in tokens.batches():
        if number := int((targets != -100).sum()):
            loss = run.model(inputs.to(device), targets.to(device), progress=run.checkpoint.progress)
            total, count = total + float(loss) * number, count + number
    out = {"loss": total / count, "targets": count}
    if tokens.bytes_per_token:
        out["bits_per_byte"] = total / count / math.log(2) / tokens.bytes_per_token
    return out


@torch.no_grad()
def hellaswag(run: Run, path: str, limit: int | None, device: torch.device) -> dict[str, float]:
    """Fractions of correct answers, as in training: see `polargrad_dist.trainer.choices`."""
    questions = read_questions(path, limit)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return run.model(tokens.to(device), progress=run.checkpoint.progress)

    right = [score(logits, one, run.tokenizer, run.model.max_sequence_length) for one in questions]
    plain, normed = (sum(answers) / len(questions) for answers in zip(*right, strict=True))
    return {"acc": plain, "acc_norm": normed, "questions": len(questions)}


def show(found: dict[str, Any]) -> None:
    """Prints the results as a table."""
    rows: list[tuple[str, str, str]] = []
    for kind, values in found.items():
        for name, figures in (
            ({"": values} if kind == "hellaswag" else values).items() if kind != "step" else ()
        ):
            for figure, value in figures.items():
                shown = f"{value:,.0f}" if float(value).is_integer() and value > 1 else f"{value:.4f}"
                rows.append((name or kind, figure, shown))
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, figure, shown in rows:
        print(f"{name:<{width}}  {figure:<16} {shown:>14}")


if __name__ == "__main__":
    run_main(main)
