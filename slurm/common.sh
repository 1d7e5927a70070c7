# shellcheck shell=bash
# What every recipe shares: the environment, a preflight, one rank a GPU started by srun, and the way back into the
# queue. A recipe asks Slurm for its size, sources this file and calls `train` with the arguments of mambair_ds.train.
#
# Submit from the root of the repository, on a file system that all nodes share. Settings of the submitting shell:
#   PYTHON     interpreter on the nodes (default: .venv/bin/python, which `make install` builds)
#   CONTAINER  run inside an image instead: a .sif file for Apptainer; anything else (an image's address or a .sqsh
#              file) goes to pyxis/Enroot. The working folder is mounted under its own path.
#   RETRIES    how often to start again after a failure that is no interruption (default: 3)
set -euo pipefail

# A rank computes on its GPU; decoding has threads of its own (data.train.threads). More threads would fight for cores,
# and float32 sums on a CPU depend on their number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Where ranks meet: the first node. The port follows from the job's number, so that jobs on one node do not collide.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# NCCL says what failed, and nothing else; INFO shows the network it chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Left to NCCL, which finds InfiniBand and the fastest interface by itself. On nodes with several networks, name the right
# one before sbatch:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   interface of the rendezvous and of plain sockets
#   export NCCL_IB_HCA=mlx5_0,mlx5_1                       InfiniBand adapters to use
# Since 22.05 srun no longer takes the job's --cpus-per-task by itself: without this a rank gets a single core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

step=(srun --kill-on-bad-exit=0)
case ${CONTAINER:-} in
    '') python=("${PYTHON:-.venv/bin/python}") ;;
    *.sif) python=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER" python) ;;
    *)
        step+=("--container-image=$CONTAINER" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
        python=(python)
        ;;
esac

# train ARGUMENTS: check, train on all ranks of the job, and queue the job again if there is more to do.
train() {
    local logs="slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID" code=0 ranks
    mkdir -p "$logs"
    trap 'again 75 "$logs/failures"; exit' USR1 TERM # told to leave before training began

    # Mistakes are found on one core before 32 GPUs start: settings, shards, disk space; it prints the plan.
    "${step[@]}" --nodes=1 --ntasks=1 "${python[@]}" -m mambair_ds.train --check --ranks "$SLURM_NTASKS" "$@" || return

    # Once one rank has left, the others get a minute: the last of them may still be sealing a checkpoint.
    "${step[@]}" --wait=60 --open-mode=append --output="$logs/rank-%t.log" \
        "${python[@]}" -u -m mambair_ds.train "$@" &
    ranks=$!
    # Slurm warns the batch shell alone (--signal=B:…); srun hands the signal on, the ranks save and leave with 75.
    trap 'kill -USR1 $ranks || :' USR1 TERM
    # A trap ends `wait` early, while srun goes on.
    while :; do
        wait "$ranks" && code=0 || code=$?
        kill -0 "$ranks" 2>/dev/null || break
    done
    again "$code" "$logs/failures"
}

# again CODE FILE: requeue after an interruption (75), and after other failures RETRIES times in a row, which FILE counts.
again() {
    local failures=0
    [[ -f $2 ]] && failures=$(<"$2")
    case $1 in
        0 | 2) return "$1" ;; # done, or a mistake that another try repeats
        75) failures=0 ;;
        *) ((++failures)) ;;
    esac
    echo "$failures" >"$2"
    if ((failures > ${RETRIES:-3})); then
        echo "Failed $failures times in a row, the last time with code $1: giving up. See ${2%/*}." >&2
        return "$1"
    fi
    echo "Left with code $1: queued again."
    scontrol requeue "$SLURM_JOB_ID"
}
