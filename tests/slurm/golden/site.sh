#!/bin/bash
# demo: 8 ranks one per GPU on 2 nodes.
# Written by trebuchet. By hand: sbatch /shared/runs/demo/job.sh

#SBATCH --job-name=demo
#SBATCH --account=my-project
#SBATCH --partition=a100,h100
#SBATCH --qos=normal
#SBATCH --constraint="nvlink|ib"
#SBATCH --reservation=course
#SBATCH --exclude=n013,n014
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:a100:4
#SBATCH --cpus-per-task=16
#SBATCH --mem=480G
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=/shared/runs/demo/logs/slurm.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --export=NONE
#SBATCH --gres-flags=enforce-binding
#SBATCH --comment="ours, not yours"

run=/shared/runs/demo
job=$SLURM_JOB_ID
cd "$run" || exit 1

# What the site asks for.
set -e
# shellcheck disable=SC1091
command -v module >/dev/null || source /etc/profile
module load cuda/12.8
# shellcheck disable=SC1090,SC1091
source ~/'my env/bin/activate'
set +e

# srun hands on what is exported here; the shell that submitted has no part in it (--export=NONE).
export SLURM_EXPORT_ENV=ALL
export HF_HOME=/shared/cache/huggingface
export HF_HUB_OFFLINE=1
export NCCL_DEBUG=WARN
export NCCL_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=16
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000
export TREBUCHET_CACHE=/shared/cache/trebuchet
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$run/logs/nccl-trace-"
WANDB_API_KEY=$(<~/.secrets/wandb) || exit 1; export WANDB_API_KEY

# The ranks know when their time ends (Slurm says so itself since 23.02) and save before, however long a step takes by then.
end=$(scontrol show job "$job" --oneliner | grep -o ' EndTime=[^ ]*')
SLURM_JOB_END_TIME=$(date --date="${end#*=}" +%s 2>/dev/null)
export SLURM_JOB_END_TIME

# The ranks meet on the first node, by the address Slurm knows it by, at a port that follows from the job id.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$(head -n 1 <<<"$nodes")" --oneliner | grep -o ' NodeAddr=[^ ]*')
export MASTER_ADDR=${MASTER_ADDR#*=} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
TREBUCHET_NODES=$(paste -sd, <<<"$nodes")  # so that one from which no rank comes can be named
export TREBUCHET_NODES

# Each task expands this itself: on the batch host SLURM_PROCID is 0, and every rank would be rank 0.
# shellcheck disable=SC2016
task='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  caches=/scratch/trebuchet-$UID  # compiled kernels stay on the node and serve the next attempt
  mkdir -p -m 700 "$caches" && [ -O "$caches" ] || { echo "$caches is not a folder of ours" >&2; exit 1; }
  export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor CUDA_CACHE_PATH=$caches/cuda
  exec "$@"'

python=python3
attempt() { "$python" -m trebuchet.slurm.attempt "$@"; }
facts() {
  date "+Now=%FT%T"
  scontrol show job "$job" --oneliner
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/^/Allocated=/"
  sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format="Node=%N=%t"
}

trap : TERM USR1  # the script outlives the ranks: it writes the record and requeues
facts | attempt begin "$run" || exit
srun --kill-on-bad-exit=1 --label --cpus-per-task=16 --mpi=none \
  bash -c "$task" rank "$python" -m trebuchet.launcher.worker "$run"
status=$? warning_s=300 restarts=3

read -r verdict word <<<"$(facts | attempt end "$run" "$status" "$warning_s" "$restarts")"
case $verdict in
  requeue)  # saved in time, or ended by nobody's fault: go on under the same id
    trap "exit 0" TERM  # which is what a requeued script gets
    scontrol requeue "$job" && exit 0
    ;;
  avoid)    # the same on other nodes than $word; the SIGTERM of the requeue may end the command that runs when it comes
    again() { "$@" || "$@" || "$@"; }
    scontrol requeuehold "$job"
    again scontrol update JobId="$job" ExcNodeList="$word"
    again scontrol release "$job" && exit 0
    ;;
  exit)
    exit "$word"
    ;;
  *)        # ended from outside before it could be decided
    exit 1
    ;;
esac
echo "the job could not be requeued; go on with: trebuchet resume $(printf %q "$run")" >&2
exit 1
