"""Data of your own under this trainer, sums such as 7+5=12: `python -m examples.own_data [RUN_DIR]`, or with torchrun -m."""

import sys

import torch

from models import ModelConfig, build_model
from polargrad_dist.optim import OptimizerConfig
from polargrad_dist.trainer import Trainer, TrainerConfig, join, seed_everything
from polargrad_dist.trainer.config import EvaluationConfig

SYMBOLS = "0123456789+=;"
PER_SEQUENCE = 8


def sequence(number):
    """Sequence ``number``, always the same: tokens and targets, of which only the results count."""
    operands = torch.randint(10, (PER_SEQUENCE, 2), generator=torch.Generator().manual_seed(number)).tolist()
    text = ";" + "".join(f"{a}+{b}={a + b:02};" for a, b in operands)
    tokens = torch.tensor([SYMBOLS.index(symbol) for symbol in text])
    targets = tokens[1:].clone().view(PER_SEQUENCE, 7)
    targets[:, :4] = -100
    return tokens[:-1], targets.flatten()


def batch(numbers):
    tokens, targets = zip(*map(sequence, numbers), strict=True)
    return torch.stack(tokens), torch.stack(targets)


class Training:
    def batches_from(self, sample):
        """This rank's micro-batches, those of a step together, from sample number ``sample`` of the whole run on."""
        share = config.global_batch // world.size
        while True:
            for first in range(0, share, config.micro_batch):
                start = sample + world.rank * share + first
                yield batch(range(start, start + config.micro_batch))
            sample += config.global_batch


class Validation:
    bytes_per_token = None

    def batches(self):
        """As many batches on each rank, of sequences that are never trained on."""
        first = 2**40 + 256 * world.rank
        yield from (batch(range(first + i, first + i + 32)) for i in range(0, 256, 32))


class Sums:
    train, validation = Training(), Validation()

    def fingerprint(self):
        """What must be the same at every start of a run."""
        return {"task": "sums", "per_sequence": PER_SEQUENCE}


config = TrainerConfig(
    run_dir=sys.argv[1] if sys.argv[1:] else "runs/sums",
    steps=150,
    global_batch=32,
    micro_batch=32,
    sequence_length=7 * PER_SEQUENCE,
    evaluation=EvaluationConfig(every=50),
)
world = join(config.device)
config = config.for_world(world.size)
seed_everything(config.seed)
shape = ModelConfig(vocab_size=len(SYMBOLS), width=64, layers=2, heads=4, max_sequence_length=128)
model = build_model(shape)
outcome = Trainer(config, OptimizerConfig(), model, Sums(), world, {"model": {"kind": "sums"}}).fit()
# Without a loss, the run had finished before, or was asked to leave
if "validation_loss" in outcome.validation:
    print(f"validation loss {outcome.validation['validation_loss']:.3f} after {outcome.step} steps")
sys.exit(outcome.exit_code)
