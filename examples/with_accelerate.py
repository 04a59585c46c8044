"""Accelerate: train, save every few steps, and resume on any number of processes.

torchrun --nproc_per_node 2 -m examples.with_accelerate FOLDER              # or accelerate launch, with FSDP2 too
torchrun --nproc_per_node 4 -m examples.with_accelerate FOLDER FOLDER/step-3
"""

import itertools
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from polargrad_dist import PolarGrad
from polargrad_dist.integrations.accelerate import consolidate_before_save

STEPS, EVERY, BATCH, LENGTH = 6, 3, 8, 64
MODEL = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
TEXT = Path(__file__).resolve().parent.parent / "README.md"


def main(folder: str, resume: str | None = None) -> list[float]:
    # Accelerate's schedulers otherwise step once per process.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL)
    optimizer = PolarGrad(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=STEPS)
    text = torch.tensor(list(TEXT.read_bytes()))
    sequences = TensorDataset(text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH))
    loader = DataLoader(sequences, BATCH // accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    consolidate_before_save(accelerator, optimizer)
    if resume:
        accelerator.load_state(resume)
    losses = []
    first = schedule.scheduler.last_epoch
    batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), first, STEPS)
    for step, (tokens,) in enumerate(batches, first + 1):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {step}: loss {losses[-1]:.3f}")
        if step % EVERY == 0:
            accelerator.save_state(f"{folder}/step-{step}")
    accelerator.save_model(model, f"{folder}/model")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
