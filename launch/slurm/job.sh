# What the batch scripts of this folder share: addresses, one task per GPU, and a requeue after a preemption.
# Sourced by them after their #SBATCH lines; "$@" goes to train.py.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Each task gets Slurm's signals itself: torchrun in between would die of SIGUSR1 and leave its workers behind.
srun "$PYTHON" train.py "$@"
code=$?

case $code in
  0) echo "finished" ;;
  75)
    echo "saved and preempted: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *) echo "ended with exit code $code" ;;
esac
exit $code
