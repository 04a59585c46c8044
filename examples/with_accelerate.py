"""Accelerate: train, save every few steps, and resume on any number of processes.

torchrun --nproc_per_node 2 -m examples.with_accelerate FOLDER              # or accelerate launch, with FSDP2 too
torchrun --nproc_per_node 4 -m examples.with_accelerate FOLDER FOLDER/step-3
"""

import itertools
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from examples import tiny
from polargrad_dist import PolarGrad
from polargrad_dist.integrations.accelerate import consolidate_before_save

STEPS, EVERY = 6, 3


def main(folder: str, resume: str | None = None) -> list[float]:
    # Accelerate's schedulers otherwise step once per process.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False)
    torch.manual_seed(0)
    model = tiny.model()
    optimizer = PolarGrad(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=STEPS)
    loader = DataLoader(TensorDataset(tiny.sequences()), tiny.BATCH // accelerator.num_processes)
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
