#!/bin/bash
# A sweep on a SLURM cluster, here with at most 16 of 64 agents at once, each on a GPU:
#
#   wandb sweep sweeps/rebrac/gym/final.yaml                      # prints the sweep's name, team/project/id
#   sbatch --array=1-64%16 sweeps/slurm.sh team/project/id        # from the checkout; results/ must be on a shared disk
#
# Without W&B the tasks take groups of the runs in sweeps' files, here up to 64 in one program, or as many as fit:
#
#   sbatch --array=1-8 sweeps/slurm.sh sweeps/rebrac/gym/dropout.yaml --together 64
#   sbatch --array=1-8 sweeps/slurm.sh sweeps/rebrac/gym/dropout.yaml --together
#
# A task trains one run or group after the other until the sweep has no more. Two minutes before its time is up it gets
# SIGTERM: the runs make checkpoints, and the job is queued again. SLURM does that, too, when the machine dies. The runs
# go on from their checkpoints. W&B is told that a run was preempted, and gives it to an agent again.
#SBATCH --job-name=sweep
#SBATCH --output=slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
set -eu
: "${1:?name the sweep: sbatch --array=1-64%16 sweeps/slurm.sh team/project/id}"
case "$*" in
    *.yaml*) command=(python -m tools.sweep "$@") ;;
    *) command=(wandb agent --forward-signals "$1") ;;
esac
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source .venv/bin/activate
again() {
    kill -TERM $! || true  # unless it has just ended
    wait $! || true
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
}
trap again TERM
"${command[@]}" &
wait $!
