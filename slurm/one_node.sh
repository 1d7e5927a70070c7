#!/bin/bash
# One node of 8 GPUs:  sbatch slurm/one_node.sh --config configs/x2.yml
# One GPU:             sbatch --ntasks-per-node=1 --gpus-per-node=1 slurm/one_node.sh --config configs/x2_light.yml
#SBATCH --job-name=one_node
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
. slurm/common.sh
train "$@"
