"""What a newcomer types in place of a configuration key, and the key that does it here.

Names are those of other trainers (Transformers, nanoGPT, torchtitan, Lightning). What no table can know, the nearest key
answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from polargrad_dist.optim.rules import ROLES

RULES = [f"optimizer.{role}" for role in ROLES]

_BATCH = {
    "trainer.global_batch": "sequences per step, over all ranks",
    "trainer.micro_batch": "sequences per forward pass on one rank",
}
_LENGTH = {"trainer.steps": "the length of a run is set in steps"}
_ARCHITECTURE = {"model.architecture": "qwen2.5, gpt2-small, gpt2-medium, gpt or transformers"}
_TEXT = {"data.paths": "files and folders, with data.source files", "data.hub.name": "with data.source hub"}
_RULE = {"optimizer.hidden.algorithm": "each role has its own rule"}
_RANKS = {"torchrun --nproc_per_node": "the launcher starts the processes"}

# A first guess, with or without the section before it: the keys that are meant, each with what it says.
GUESSES: dict[str, Mapping[str, str]] = {
    guess: meant
    for guesses, meant in (
        ("batch batch_size bs train_batch_size global_batch_size", _BATCH),
        ("gradient_accumulation gradient_accumulation_steps grad_accum accumulation", _BATCH),
        ("micro_batch_size per_device_batch_size per_device_train_batch_size", {"trainer.micro_batch": ""}),
        (
            "steps max_steps num_steps total_steps train_steps iterations iters max_iters",
            {"trainer.steps": ""},
        ),
        ("epochs epoch max_epochs num_epochs num_train_epochs", _LENGTH),
        (
            "seq_len seq_length max_seq_len max_length context context_length block_size",
            {"trainer.sequence_length": ""},
        ),
        ("model arch architecture model_name model_type model.name model.type", _ARCHITECTURE),
        ("d_model dim n_embd hidden_size hidden_dim", {"model.width": ""}),
        ("depth n_layer n_layers num_layers num_hidden_layers", {"model.layers": ""}),
        ("n_head n_heads num_heads num_attention_heads", {"model.heads": ""}),
        ("data", {"data.source": "builtin, files, hub or shards"} | _TEXT),
        ("dataset dataset_name data_set path file files data_path data_dir train_file data.dir", _TEXT),
        ("data.tokenizer tokenizer tokenizer_name", {"data.tokenizer.name": ""}),
        ("data.hub hub", {"data.hub.name": ""}),
        ("optimizer optim optimizer_name optimizer.name optimizer.type algorithm rule", _RULE),
        ("trainer.schedule schedule scheduler lr_scheduler lr_schedule", {"trainer.schedule.kind": ""}),
        ("warmup warmup_steps num_warmup_steps warmup_iters", {"trainer.schedule.warmup_steps": ""}),
        ("min_lr", {"trainer.schedule.floor": "a factor of the learning rate"}),
        ("dtype bf16 fp16 amp mixed_precision", {"trainer.precision": "fp32, bf16-mixed or bf16"}),
        ("clip grad_clip gradient_clip gradient_clip_val max_grad_norm", {"trainer.clip_norm": ""}),
        ("out output out_dir output_dir save_dir log_dir", {"trainer.run_dir": ""}),
        ("trainer.evaluation eval_every eval_interval eval_steps", {"trainer.evaluation.every": ""}),
        ("trainer.checkpoint save_every save_interval save_steps", {"trainer.checkpoint.every": ""}),
        ("trainer.logging log_every log_interval logging_steps", {"trainer.logging.every": ""}),
        ("resume_from resume_from_checkpoint load", {"trainer.checkpoint.resume": ""}),
        (
            "trainer.strategy strategy parallel ddp fsdp zero",
            {"trainer.strategy.name": "ddp, fsdp, hsdp or deepspeed"},
        ),
        ("gpus num_gpus devices nproc nproc_per_node world_size num_processes", _RANKS),
    )
    for guess in guesses.split()
}
# Other names of a rule's fields, of which each role has its own.
FIELDS = {"learning_rate": "lr", "wd": "weight_decay"}


def unknown(key: str, known: Iterable[str]) -> str:
    """The refusal of a key that does not exist, with the one that was meant: by the table, by its beginning, by likeness."""
    known = [name for name in known if not name.endswith("+")]
    return f"there is no configuration key {key}{_hint(key.replace('-', '_'), known)}"


def no_section(key: str, value: object) -> str:
    """The refusal of a value where a section's keys belong."""
    meant = f": did you mean {_named(GUESSES[key])}?" if key in GUESSES else ""
    return f"{key} is {value}, expected a mapping with its fields{meant}"


def _hint(key: str, known: list[str]) -> str:
    *section, last = key.split(".")
    last = FIELDS.get(last, last)
    if key in GUESSES or (section[:1] != ["optimizer"] and last in GUESSES):
        return f": did you mean {_named(GUESSES[key] if key in GUESSES else GUESSES[last])}?"
    of_roles = [f"{role}.{last}" for role in RULES if f"{role}.{last}" in known]
    if of_roles and section in ([], ["optimizer"], ["trainer"]):
        return f": each role has its own, one of {', '.join(of_roles)}"
    if (renamed := ".".join((*section, last))) in known:
        return f": did you mean {renamed}?"
    begun = [name for name in known if name.startswith(key)]
    if 1 < len(begun) <= 5:
        return f": did you mean one of {', '.join(begun)}?"
    # Of keys with the same end, the one that is not of a role alone
    leaf = {name.split(".")[-1]: name for name in sorted(known, key=lambda name: (-name.count("."), name))}
    near = (
        begun[:1]
        or difflib.get_close_matches(key, known, 1, 0.6)
        or [leaf[name] for name in difflib.get_close_matches(last, leaf, 1, 0.6)]
    )
    return f": did you mean {near[0]}?" if near else ": see --help for the keys"


def _named(meant: Mapping[str, str]) -> str:
    return " or ".join(f"{key} ({what})" if what else key for key, what in meant.items())
