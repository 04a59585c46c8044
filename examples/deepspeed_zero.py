"""PolarGrad under DeepSpeed's ZeRO: `deepspeed examples/deepspeed_zero.py --stage 2`, or with torchrun; stages 0 to 3.

Without GPUs: `deepspeed --num_accelerators 2 examples/…`. Starting it again resumes from its checkpoint.
"""

import argparse

import deepspeed
import torch
from torch import nn

from polargrad_dist.integrations.deepspeed import ZeroPolarGrad, without_inference_kernel

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--checkpoints", default="runs/zero")
# DeepSpeed's launcher gives it
parser.add_argument("--local_rank", type=int)
args = parser.parse_args()
WORDS = 64


class Bigrams(nn.Module):
    """Learns which word follows which."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, WORDS, bias=False)
        self.block = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, words):
        x = self.embed(words[:, :-1])
        logits = self.head(x + self.block(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


without_inference_kernel()
deepspeed.init_distributed()
torch.manual_seed(0)
model, follower = Bigrams(), torch.randperm(WORDS)
config = {
    "train_micro_batch_size_per_gpu": 16,
    # Before the oracle
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": args.stage},
}
optimizer = ZeroPolarGrad(model, hidden={"lr": 0.02}, embed={"scale": "nuclear", "lr": 0.02})
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.load_checkpoint(args.checkpoints)
loss = None
for step in range(engine.global_steps, args.steps):
    torch.manual_seed(step * engine.world_size + engine.global_rank)
    words = [torch.randint(WORDS, (16,))]
    # Nine of ten words are followed by theirs: 0.74 nats a word
    for _ in range(8):
        words.append(torch.where(torch.rand(16) < 0.9, follower[words[-1]], torch.randint(WORDS, (16,))))
    loss = engine(torch.stack(words, 1).to(engine.device))
    engine.backward(loss)
    engine.step()
engine.save_checkpoint(args.checkpoints)
# Without a loss, the run had finished before
if loss is not None and engine.global_rank == 0:
    print(f"loss {loss.item():.3f} after {engine.global_steps} steps on {engine.world_size} ranks")
