"""PolarGrad under DeepSpeed's ZeRO: `deepspeed --num_gpus 2 examples/deepspeed_zero.py`, or with torchrun; --stage 0 to 3.

On a machine without GPUs: `deepspeed --num_accelerators 2 examples/deepspeed_zero.py`. A second start goes on from the
checkpoint.
"""

import argparse

import deepspeed
import torch
from deepspeed import comm
from torch import nn

from polargrad_dist.integrations.deepspeed import ZeroPolarGrad, without_inference_kernel

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--checkpoints", default="runs/zero")
parser.add_argument("--local_rank", type=int)  # which DeepSpeed's launcher gives
args = parser.parse_args()

without_inference_kernel()
deepspeed.init_distributed()
torch.manual_seed(0)
WORDS = 64


class Bigrams(nn.Module):
    """Learns which of ``WORDS`` words follows which."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, WORDS, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)
        )

    def forward(self, words):
        x = self.embed(words[:, :-1])
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), words[:, 1:].flatten())


model = Bigrams()
config = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 1.0,  # before the oracle
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": args.stage},
    "steps_per_print": 1000,
}
optimizer = ZeroPolarGrad(model, hidden={"lr": 0.02}, embed={"lr": 0.02})
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.load_checkpoint(args.checkpoints)
follower = torch.randperm(WORDS)  # one seed, so the same language on every rank
for step in range(engine.global_steps, args.steps):
    torch.manual_seed(step * comm.get_world_size() + comm.get_rank())
    words = [torch.randint(WORDS, (16,))]
    for _ in range(8):
        words.append(torch.where(torch.rand(16) < 0.9, follower[words[-1]], torch.randint(WORDS, (16,))))
    loss = engine(torch.stack(words, 1).to(engine.device))
    engine.backward(loss)
    engine.step()
engine.save_checkpoint(args.checkpoints)
if comm.get_rank() == 0:
    print(
        f"loss {float(loss):.3f} after {engine.global_steps} steps on {comm.get_world_size()} ranks, stage {args.stage}"
    )
