#!/usr/bin/env bash
# Starts a run, and continues it after every limit or preemption:  sbatch slurm.sh FLAGS OF train_leap_align.py
#SBATCH --job-name=leap-align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=leap-align-%j.log

[[ " $*" =~ .*\ --out[=\ ]([^ ]+) ]]
out=${BASH_REMATCH[1]:?add --out FOLDER, a path without spaces}
checkpoints() { ls -l --full-time "$out"/checkpoint/*/state.json 2>&1; }
before=$(checkpoints)

export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs on a node take two ports
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
trap : USR1 TERM  # this shell waits for srun also if it is warned itself

# A process a GPU.  Of a lost process the others know only in their next call to it: they get a minute (--wait).
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train_leap_align.py "$@" --resume' bash "$@"
status=$?
job=$(scontrol show job "$SLURM_JOB_ID")
[[ $status != 0 && $job = *JobState=RUNNING* ]] || exit $status  # finished, cancelled, or already requeued by Slurm
if [[ $job =~ PreemptTime=[0-9] || ($status = 138 && $(checkpoints) != "$before") ]]; then
    scontrol requeue "$SLURM_JOB_ID"  # preempted, or warned (128 + SIGUSR1) with a new checkpoint
elif ! timeout 120 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true; then
    sleep 900  # a node is lost: Slurm requeues the job when it notices, but only while it runs
fi
exit $status
