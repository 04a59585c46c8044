"""Transformers' Trainer: train, save every few steps, and resume on any number of processes.

torchrun --nproc_per_node 2 -m examples.with_transformers FOLDER
torchrun --nproc_per_node 4 -m examples.with_transformers FOLDER FOLDER/checkpoint-3
"""

import os
import sys

import torch
from transformers import Trainer, TrainingArguments, set_seed

from examples import tiny
from polargrad_dist import PolarGrad
from polargrad_dist.integrations.transformers import ConsolidateBeforeSave

STEPS, EVERY = 6, 3


def main(folder: str, resume: str | None = None) -> list[float]:
    set_seed(0)
    model = tiny.model()
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        save_steps=EVERY,
        logging_steps=1,
        per_device_train_batch_size=tiny.BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": tokens, "labels": tokens} for tokens in tiny.sequences()],
        # The learning rates are the optimizer's own, in place of those of TrainingArguments.
        optimizer_cls_and_kwargs=(PolarGrad, {"model": model, "hidden": {"lr": 0.02}}),
        callbacks=[ConsolidateBeforeSave()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/model")
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main(*sys.argv[1:])
