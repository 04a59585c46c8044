"""The LM evaluation harness on a run's model in memory, or on an export: tasks by name, or from local files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from models import LanguageModel
from polargrad_dist.errors import ConfigError
from tools.export_text import fast_tokenizer
from tools.runs import Run


def as_transformers(model: LanguageModel, progress: float) -> Any:
    """A Transformers model that shares the weights. progress: as in ``forward``."""
    for name in ("qwen", "inner"):
        if hasattr(model, name):
            return getattr(model, name)
    from models.hub.modeling_polargrad_gpt import PolarGradGPTConfig, PolarGradGPTForCausalLM

    stated = model.hub_config(progress)
    kept = {
        key: value for key, value in stated.items() if key not in ("model_type", "architectures", "auto_map")
    }
    with torch.device("meta"):
        made = PolarGradGPTForCausalLM(PolarGradGPTConfig(**kept))
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def of_run(run: Run, device: torch.device, batch_size: int) -> Any:
    """The harness's model of a run. Raises ``ConfigError`` if the harness is not installed."""
    harness = _harness()
    model = as_transformers(run.model.to(device), run.checkpoint.progress).eval()
    tokenizer = fast_tokenizer(run.tokenizer)
    length = run.model.max_sequence_length
    return harness(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=min(length, 2**20)
    )


def of_export(folder: Path, device: torch.device, batch_size: int, trust: bool) -> Any:
    """The harness's model of a folder that Transformers loads."""
    return _harness()(
        pretrained=str(folder),
        device=str(device),
        batch_size=batch_size,
        dtype="auto",
        trust_remote_code=trust,
    )


def _harness() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks is set, but lm-eval is not installed: pip install '.[lm-eval]', or leave --tasks out"
        )
    from lm_eval.models.huggingface import HFLM

    return HFLM


def run_tasks(
    model: Any, tasks: list[str], *, include: Path | None, limit: int | None, shots: int | None
) -> dict[str, dict[str, float]]:
    """Each task's results by name. include: a folder of tasks in the harness's YAML format. limit: documents per task.

    Raises ``ConfigError`` for an unknown task.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    # The harness's own index takes seconds to read, and is needed only for its own tasks.
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include) if include else None)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(
            f"--tasks names {unknown[0]!r}, which lm-eval does not know: see `lm-eval ls tasks`, or name the folder of your "
            "own with --include"
        )
    found = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        log_samples=False,
        bootstrap_iters=0,
    )
    # None on ranks other than 0, and there is only one
    assert found is not None
    return {task: _figures(values) for task, values in found["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """The results of a task under short names: ``acc`` for ``acc,none``."""
    named = {key.removesuffix(",none"): value for key, value in values.items()}
    return {
        key: float(value)
        for key, value in named.items()
        if isinstance(value, int | float) and "stderr" not in key
    }
