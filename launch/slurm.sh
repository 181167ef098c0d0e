#!/bin/bash
# Slurm: sbatch launch/slurm.sh nano_moe --option value …
#
# Edit the #SBATCH lines for your cluster, and submit from this repository's folder; it and the run's folder
# must be on storage that all nodes share. Two minutes before the time limit, or when the job is preempted,
# Slurm signals this script: the run saves its step, and the job is queued again and continues from there.
#SBATCH --job-name=nanomoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

cd "$SLURM_SUBMIT_DIR" && source .venv/bin/activate || exit 1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv_backend=c10d \
    --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    -m nanomoe.train "$@" &
run=$!

requeue() {
    trap '' TERM  # once is enough
    kill -TERM $run
    wait $run
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM
wait $run
