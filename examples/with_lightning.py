"""Lightning: train, save every epoch, and resume on any number of processes; it puts the optimizer's state together itself.

python -m examples.with_lightning FOLDER 2                      # the number of processes, which Lightning starts
python -m examples.with_lightning FOLDER 4 FOLDER/epoch=0-step=3.ckpt
"""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples import tiny
from polargrad_dist import PolarGrad

BATCHES, EPOCHS = 3, 2


class Bytes(lightning.LightningModule):
    """A model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.model()
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (tokens,) = batch
        logits = self.model(input_ids=tokens).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> PolarGrad:
        return PolarGrad(self.model)


def main(folder: str, processes: str = "1", resume: str | None = None) -> list[float]:
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu", devices=int(processes), strategy="ddp",
        max_epochs=EPOCHS, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        callbacks=[ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1)],
    )  # fmt: skip
    module = Bytes()
    sequences = TensorDataset(tiny.sequences()[: BATCHES * tiny.BATCH])
    loader = DataLoader(sequences, tiny.BATCH // int(processes))
    trainer.fit(module, loader, ckpt_path=resume)
    return module.losses


if __name__ == "__main__":
    main(*sys.argv[1:])
