#!/bin/bash
# Machines without a scheduler: run this on every node, with the same list and each node's own number.
#   docker/multinode.sh 0 node0,node1,node2,node3 --config configs/x2.yml      # on node0
#   docker/multinode.sh 1 node0,node1,node2,node3 --config configs/x2.yml      # on node1, and so on
# DATA and EXPERIMENTS name folders that all nodes share. IMAGE, GPUS (a node; default 8) and PORT may be set.
# `docker stop mambair-ds` on every node saves; the same commands go on.
set -euo pipefail
if (($# < 3)) || ! [[ $1 =~ ^[0-9]+$ ]]; then
    echo "usage: $0 NODE_NUMBER NODE,NODE,... ARGUMENTS OF mambair_ds.train" >&2
    exit 2
fi
number=$1 nodes=$2
shift 2
IFS=, read -ra names <<<"$nodes"
if ((number >= ${#names[@]})); then
    echo "error: node $number of ${#names[@]}: nodes count from 0" >&2
    exit 2
fi
experiments=$(realpath "${EXPERIMENTS:-experiments}")
mkdir -p "$experiments"
printf "%s slots=${GPUS:-8}\n" "${names[@]}" >"$experiments/.hostfile.$number"
# The host's network, so that NCCL finds the real interfaces; its shared memory; InfiniBand if there is any.
devices=()
[[ ! -e /dev/infiniband ]] || devices=(--device /dev/infiniband)
exec docker run --rm --name mambair-ds --gpus all --network host --ipc host --ulimit memlock=-1 --stop-timeout 300 \
    "${devices[@]}" --user "$(id -u):$(id -g)" --volume "$(realpath "${DATA:-data}"):/data" --volume "$experiments:/experiments" \
    --env NCCL_DEBUG --env NCCL_SOCKET_IFNAME --env GLOO_SOCKET_IFNAME --env NCCL_IB_HCA "${IMAGE:-mambair-ds}" \
    deepspeed --hostfile "/experiments/.hostfile.$number" --no_ssh --node_rank "$number" \
    --master_addr "${names[0]}" --master_port "${PORT:-29500}" -m mambair_ds.train "$@"
