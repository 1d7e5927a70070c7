#!/bin/bash
# Any number of nodes of 8 GPUs:  sbatch --nodes=8 slurm/nodes.sh --config configs/x2.yml --set data.train.batch_size=4
# The batch of a step is batch_size x ranks x accumulation.
#SBATCH --job-name=nodes
#SBATCH --nodes=2
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
