#!/usr/bin/env bash
# Trains on the GPUs of this machine, or of several: one process per GPU.
#
#   launch/torchrun.sh --config configs/gpt2-small-fineweb.yaml [--any.key value ...]
#
# On several machines run the same line on each, with the same first three variables:
#   NODES=2 MASTER_ADDR=first-host MASTER_PORT=61000 NODE_RANK=0|1 launch/torchrun.sh ...
#
# RESTARTS=3 starts the processes again after one has died; the run resumes from its newest valid checkpoint. The number of
# processes may differ between starts (PROCESSES=1, then 2): the global batch stays, the micro-batches are divided anew.
# NODES=1:2 continues with one machine if the second does not come back, and includes it again when it does.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
NODES=${NODES:-1}
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
RESTARTS=${RESTARTS:-0}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + PROCESSES - 1) / PROCESSES ))}
# Without it a restart under --standalone finds the port of the old store taken.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [ "$NODES" != 1 ]; then
  : "${MASTER_ADDR:?set MASTER_ADDR to the host name of the first node}"
  : "${NODE_RANK:?set NODE_RANK to the number of this node, 0 for the first}"
  # Not torchrun's static rendezvous: there the machines do not find each other again after a restart.
  rendezvous=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-61000}" --rdzv_id polargrad
    --rdzv_conf "is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)")
else
  rendezvous=(--standalone)
fi

exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$PROCESSES" --max-restarts "$RESTARTS" \
  train.py "$@"
