# What the batch scripts of this folder share: addresses, one task per GPU, and a requeue after a preemption.
# Sourced by them after their #SBATCH lines; "$@" goes to train.py.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# Private ports (RFC 6335) above those that Linux gives to outgoing connections: one range to open between the nodes.
export MASTER_PORT=$((61000 + SLURM_JOB_ID % 4500))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# srun can come back with 0 after a node has failed; only rank 0, which runs on this node, knows that the run is done.
# The name of a file for it to create, in the first folder that takes files; empty if none does.
for folder in "${TMPDIR:-/tmp}" /tmp; do
  POLARGRAD_FINISHED=$(mktemp "$folder/polargrad-$SLURM_JOB_ID-XXXXXX" 2>/dev/null) && rm "$POLARGRAD_FINISHED" && break
done
export POLARGRAD_FINISHED

# Each task gets Slurm's signals itself: torchrun in between would die of SIGUSR1 and leave its workers behind.
# Since Slurm 22.05 srun no longer takes the job's CPUs per task by itself and would bind each task to one core.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$PYTHON" train.py "$@"
code=$?
if [ "$code" = 0 ] && [ -n "$POLARGRAD_FINISHED" ] && ! rm "$POLARGRAD_FINISHED" 2>/dev/null; then
  code=1
  echo "srun ended with 0 before the run was finished, as after a node's failure: Slurm requeues the job, or submit it again"
fi

# One task of an array bears the array's own job id, with which Slurm would requeue, and so kill, all the others.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

case $code in
  0) echo "finished" ;;
  75 | 138 | 143)
    # 138 and 143: SIGUSR1 or SIGTERM came before the first step, or a second time; what is on disk is whole.
    echo "preempted (exit code $code): back into the queue"
    scontrol requeue "$job" || echo "Slurm did not requeue job $job: submit it again, it will resume"
    ;;
  *) echo "ended with exit code $code" ;;
esac
exit $code
