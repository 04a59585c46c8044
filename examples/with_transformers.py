"""Transformers' Trainer: train, save every few steps, and resume on any number of processes.

torchrun --nproc_per_node 2 -m examples.with_transformers FOLDER
torchrun --nproc_per_node 4 -m examples.with_transformers FOLDER FOLDER/checkpoint-3
"""

import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from polargrad_dist import PolarGrad
from polargrad_dist.integrations.transformers import ConsolidateBeforeSave

STEPS, EVERY, BATCH, LENGTH = 6, 3, 8, 64
MODEL = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
TEXT = Path(__file__).resolve().parent.parent / "README.md"


def main(folder: str, resume: str | None = None) -> list[float]:
    set_seed(0)
    model = LlamaForCausalLM(MODEL)
    text = torch.tensor(list(TEXT.read_bytes()))
    sequences = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        save_steps=EVERY,
        logging_steps=1,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": tokens, "labels": tokens} for tokens in sequences],
        # The learning rates are the optimizer's own, in place of those of TrainingArguments.
        optimizer_cls_and_kwargs=(PolarGrad, {"model": model, "hidden": {"lr": 0.02}}),
        callbacks=[ConsolidateBeforeSave()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/model")
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main(*sys.argv[1:])
