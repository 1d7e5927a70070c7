#!/bin/bash
# A configuration an array task, each on one node:  sbatch --array=0-2 slurm/array.sh configs/x[234]_light.yml
# What follows the files goes to every task; --array=0-17%4 runs four of eighteen at a time.
#SBATCH --job-name=array
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
. slurm/common.sh
configs=()
while [[ ${1:-} == *.yml ]]; do
    configs+=("$1")
    shift
done
if ((SLURM_ARRAY_TASK_ID >= ${#configs[@]})); then
    echo "Array task $SLURM_ARRAY_TASK_ID has no configuration: ${#configs[@]} given, tasks count from 0." >&2
    exit 2
fi
train --config "${configs[SLURM_ARRAY_TASK_ID]}" "$@"
