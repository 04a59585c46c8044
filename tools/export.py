"""Exports a run's weights: `python -m tools.export RUN_OR_CHECKPOINT OUT [--dtype bfloat16] [--format dcp]`.

The default is a folder that Transformers loads: safetensors, configuration, tokenizer, model card; GPT-2 models come with
their modelling code. ``--format dcp`` writes weights and optimizer state as a plain `torch.distributed.checkpoint`. Tensors
are read one by one, whatever ranks saved them, so that at most one shard is in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.hub_probe import first_line
from models import LanguageModel
from models.auto import TransformersModel
from polargrad_dist.errors import CheckpointError, ConfigError
from polargrad_dist.trainer.checkpoint.single import MODEL, Checkpoint, find_checkpoint
from polargrad_dist.trainer.cli import run
from polargrad_dist.trainer.initial import fill, weights
from tools.arguments import Arguments
from tools.export_text import DTYPES, add_tokenizer, model_card
from tools.runs import build, known_tokens

SHARD_BYTES = 5 * 10**9


def main() -> int:
    parser = Arguments(
        "Export the weights of a run.",
        "a run and a folder: a checkpoint is --step N, or the path of its folder in the run's place",
        dict.fromkeys(("out", "output", "output_dir", "o"), "the folder as the second argument: RUN OUT"),
    )
    parser.add_argument("run", help="a run directory, or one of its checkpoints")
    parser.add_argument("out", help="a folder to write, which must not exist or be empty")
    parser.add_argument(
        "--step", type=int, default=None, help="checkpoint to export; default: the newest valid one"
    )
    parser.add_argument("--format", choices=("transformers", "dcp"), default="transformers")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default=None, help="default: the widest among the weights"
    )
    parser.add_argument(
        "--weights",
        choices=("validated", "last"),
        default="validated",
        help="for a run that averages its last weights: the validated weights, or the last ones",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("beside", "apart", "none"),
        default="beside",
        help="beside: in the same folder; apart: in a folder tokenizer/, where the model's type cannot affect it; none",
    )
    options = parser.read()
    checkpoint = find_checkpoint(options.run, options.step)
    if options.format == "dcp" and options.dtype is not None:
        raise ConfigError("--dtype is set with --format dcp, which keeps every tensor's dtype: leave it out")
    out = new_folder(Path(options.out))
    with all_or_nothing(out):
        if options.format == "dcp":
            export_dcp(replace(checkpoint, last=True), out)
        else:
            checkpoint = replace(checkpoint, last=options.weights == "last")
            export(checkpoint, out, dtype=options.dtype, tokenizer=options.tokenizer)
    print(f"step {checkpoint.step} of {checkpoint.run_dir} is in {out}")
    return 0


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[None]:
    """Empties the folder, which was new, if writing it ends early: half an export looks like one.

    Raises ``ConfigError`` if it cannot be written.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except BaseException as error:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            # A failed write of torch's: often a RuntimeError
            cause = next(iter(error.failures.values()))[0]
        if cause is not error or isinstance(cause, OSError | SafetensorError):
            reason = getattr(cause, "strerror", None) or first_line(cause)
            raise ConfigError(
                f"{out} cannot be written ({reason}), and nothing is left there: free some space, or choose another folder"
            ) from error
        raise


def new_folder(out: Path) -> Path:
    """Raises ``ConfigError`` unless the folder is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty, expected a new or empty folder: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made ({error.strerror}): choose another folder") from error
    return out


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: str = "beside",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills a new or empty folder with what ``AutoModelForCausalLM.from_pretrained`` loads.

    dtype: of all weights, a key of `DTYPES`; None for the widest floating type among them. Raises ``ConfigError`` if
    AutoTokenizer gives other token ids than the run's tokenizer.
    """
    known = known_tokens(checkpoint)
    model = build(checkpoint, known, device="meta")
    kind = DTYPES[dtype] if dtype else _widest(checkpoint)
    config = model.hub_config(checkpoint.progress) | {"dtype": _name(kind), "torch_dtype": _name(kind)}
    if not (isinstance(model, TransformersModel) and model.renames):
        _write_weights(checkpoint, model, out, kind, shard_bytes)
    else:
        # Its files and modules name weights differently: Transformers writes them, from the whole model
        whole: Any = build(checkpoint, known)
        fill(whole, checkpoint, "the run")
        whole.to(kind).inner.save_pretrained(out, max_shard_size=shard_bytes)
    _write(out / "config.json", config)
    generation = _markers(config) | {"use_cache": True}
    rows = model.get_output_embeddings().weight.shape[0]
    # A head padded to whole blocks: the padding rows are not tokens
    if rows > model.vocab_size:
        generation["suppress_tokens"] = list(range(model.vocab_size, rows))
    _write(out / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    if model.hub_code is not None:
        shutil.copyfile(model.hub_code, out / model.hub_code.name)
    if tokenizer != "none":
        add_tokenizer(known, out, apart=tokenizer == "apart", trust=model.hub_code is not None)
    (out / "README.md").write_text(model_card(checkpoint, model, known, kind, tokenizer), encoding="utf-8")
    ordinary_modes(out)


def _markers(config: dict[str, Any]) -> dict[str, Any]:
    """The special tokens of generation. Transformers takes several ends, but one beginning and one padding token."""
    ends = config.get("eos_token_id")
    first = next(iter(ends), None) if isinstance(ends, list) else ends
    begin, padding = (config.get(f"{name}_token_id") for name in ("bos", "pad"))
    return {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": ends,
        "pad_token_id": first if padding is None else padding,
    }


def ordinary_modes(folder: Path) -> None:
    """Makes files as readable as the umask allows: libraries make some of them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _widest(checkpoint: Checkpoint) -> torch.dtype:
    """The widest floating type of the weights: embedding tables may be bf16 and matrices fp32."""
    kinds = [checkpoint.manifest.tensors[MODEL + name].dtype for name in checkpoint.names()]
    return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: kind.itemsize)


def _write_weights(
    checkpoint: Checkpoint, model: LanguageModel, out: Path, kind: torch.dtype, shard_bytes: int
) -> None:
    """One safetensors file, or several below ``shard_bytes`` with an index, as Transformers writes them."""
    from safetensors.torch import save_file

    wanted = {MODEL + name for name in weights(model)}
    names = [name for name in map(MODEL.__add__, checkpoint.names()) if name in wanted]
    if missing := sorted(wanted - set(names)):
        raise CheckpointError(
            f"{checkpoint.folder} has no {missing[0].removeprefix(MODEL)}, expected the same model"
        )
    sizes = {name: checkpoint.manifest.tensors[name].bytes for name in names}
    for name in names:
        saved = checkpoint.manifest.tensors[name]
        if saved.dtype.is_floating_point:
            sizes[name] = sizes[name] // saved.dtype.itemsize * kind.itemsize
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in names:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        tensors = {
            name.removeprefix(MODEL).removeprefix(model.hub_prefix): checkpoint.read(name) for name in shard
        }
        tensors = {n: t.to(kind) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        _write(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index},
        )


def export_dcp(checkpoint: Checkpoint, out: Path) -> None:
    """Writes a plain torch DCP checkpoint: ``model.<name>`` for weights, ``optim.<name>.<state>`` for the optimizer's state.

    ``dcp.load({"model": model.state_dict()}, checkpoint_id=out)`` reads it, at any world size.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import MetadataIndex

    class Lazily(dcp.DefaultSavePlanner):
        """Plans with shapes only, and reads each tensor when it is written."""

        def lookup_object(self, index: MetadataIndex) -> Any:
            part, name = index.fqn.split(".", 1)
            return checkpoint.read(f"{part}/{name}")

    state: dict[str, Any] = {}
    for part in ("model", "optim"):
        shapes = {
            name: checkpoint.manifest.tensors[f"{part}/{name}"] for name in checkpoint.names(part + "/")
        }
        state[part] = {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in shapes.items()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(out), planner=Lazily(), no_dist=True)
    ordinary_modes(out)


if __name__ == "__main__":
    run(main)
