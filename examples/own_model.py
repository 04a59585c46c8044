"""A module of your own under this trainer: `python -m examples.own_model [RUN_DIR]`, or with torchrun -m."""

import sys

from torch import nn

from data import DataConfig, open_data
from data.config import TokenizerConfig
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import Trainer, TrainerConfig, join, seed_everything


class Recurrent(nn.Module):
    """Two GRU layers: ``forward(tokens, targets, progress=…)`` gives the mean loss, without targets the logits."""

    def __init__(self, vocabulary: int, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, targets=None, *, progress=0.0):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)[0]
        logits = self.head(x).float()
        return (
            logits
            if targets is None
            else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )


config = TrainerConfig(run_dir=sys.argv[1] if sys.argv[1:] else "runs/own", steps=40, sequence_length=64)
world = join(config.device)
data = open_data(
    DataConfig(tokenizer=TokenizerConfig(vocab_size=512), max_tokens=200_000, validation_fraction=0.05),
    sequence_length=config.sequence_length,
    global_batch=config.global_batch,
    micro_batch=config.micro_batch,
    rank=world.rank,
    world=world.size,
    all_gather=world.gather,
    meanwhile=world.meanwhile,
)
seed_everything(config.seed)
model = Recurrent(vocabulary=512)
outcome = Trainer(config, OptimizerConfig(), model, data, world, {"model": {"kind": "GRU"}}).fit()
# Without a loss, the run had finished before, or was asked to leave
if "validation_loss" in outcome.validation:
    print(f"validation loss {outcome.validation['validation_loss']:.3f} after {outcome.step} steps")
sys.exit(outcome.exit_code)
