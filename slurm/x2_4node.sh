#!/bin/bash
# MambaIRv2-Base x2 on 4 nodes of 8 GPUs:  sbatch slurm/x2_4node.sh [arguments of mambair_ds.train]
#SBATCH --job-name=x2_4node
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
. slurm/common.sh
# One sample a rank: 32 ranks make the published batch of 32.
train --config configs/x2.yml --set data.train.batch_size=1 "$@"
