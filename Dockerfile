# Two images from one file:
#   docker build -t mambair-ds .                      trains on GPUs
#   docker build -t mambair-ds:cpu --target cpu .     no CUDA toolkit and no CUDA torch; the demo and the tests
#
# torch's wheels bring cuBLAS, cuDNN and NCCL themselves, so the `base` flavour (the CUDA runtime library alone) is the
# runtime image; the `runtime` flavour would hold a second copy of them. For a build that stays the same, pass the base
# by digest; what a tag means today:
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' nvidia/cuda:13.0.2-base-ubuntu24.04
#   docker build --build-arg BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:... .
# The release workflow does this for all three, and writes the digests into the image's labels.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CPU_IMAGE=debian:bookworm-slim

# ---- GPU: wheels ----
FROM ${BUILD_IMAGE} AS wheels
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY docker/requirements.py pyproject.toml constraints.txt ./
RUN python requirements.py demo > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --requirement requirements.txt
# The published CUDA kernels, for comparison with ours: the GPU architectures to build them for, or nothing to leave
# them out. mamba-ssm's and causal-conv1d's setup.py name ten architectures themselves; these take their place.
ARG CUDA_ARCHS="8.0;9.0;10.0;12.0"
ARG MAX_JOBS=4
COPY docker/published_kernels.sh ./
RUN --mount=type=cache,target=/root/.cache/pip \
    MAX_JOBS="$MAX_JOBS" ./published_kernels.sh "$CUDA_ARCHS"
COPY README.md LICENSE ./
COPY mambair_ds mambair_ds
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps . && rm -rf build
COPY --chmod=755 docker/deepspeed /opt/venv/bin/deepspeed
RUN sed -i '1s|.*|#!/opt/venv/bin/python|' /opt/venv/bin/deepspeed

# ---- CPU: wheels ----
FROM ${CPU_IMAGE} AS cpu-wheels
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY docker/requirements.py pyproject.toml constraints.txt ./
RUN python requirements.py demo test > requirements.txt
# PyPI's torch is the CUDA build; its CPU build lives in an index of its own. Empty where pip is told another way.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Packages' own tests, headers, symbols, profilers and DALI's GPU decoders go: a gigabyte that nothing here uses.
COPY docker/slim.sh ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt --requirement requirements.txt \
    && python -c 'import torch; assert torch.version.cuda is None, "this is a CUDA build of torch"' \
    && ./slim.sh /opt/venv/lib/python3*/site-packages
COPY README.md LICENSE ./
COPY mambair_ds mambair_ds
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps . && rm -rf build
COPY --chmod=755 docker/deepspeed /opt/venv/bin/deepspeed
RUN sed -i '1s|.*|#!/opt/venv/bin/python|' /opt/venv/bin/deepspeed

# ---- CPU ----
FROM ${CPU_IMAGE} AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 tini && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /cache mambair \
    && install -d -m 1777 /data /experiments /cache \
    && install -d /workspace && ln -s /experiments /workspace/experiments && ln -s /experiments /workspace/out \
    && ln -s /data/shards /workspace/shards && ln -s /data/datasets /workspace/datasets
COPY --from=cpu-wheels /opt/venv /opt/venv
COPY --chmod=755 docker/entry docker/healthcheck /usr/local/bin/
COPY . /workspace
ENV PATH=/opt/venv/bin:$PATH HOME=/cache USER=mambair PYTHONUNBUFFERED=1 DS_ACCELERATOR=cpu
ARG VERSION=0.1.0 REVISION=unknown CPU_IMAGE
LABEL org.opencontainers.image.title="mambair-ds" \
      org.opencontainers.image.description="Train MambaIRv2 image restoration (CPU: demo and tests)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${CPU_IMAGE}"
WORKDIR /workspace
USER 1000:1000
VOLUME ["/data", "/experiments", "/cache"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=10s --start-period=120s CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "entry"]

# ---- GPU ----
# The last stage is the default target.
FROM ${BASE_IMAGE} AS gpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# gcc and the headers of C and Python: on first use Triton compiles a launcher stub for every kernel signature with $CC.
# Kernels themselves need no nvcc; their assembler comes in triton's wheel.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && { ! id -nu 1000 2>/dev/null || userdel "$(id -nu 1000)"; } \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /cache mambair \
    && install -d -m 1777 /data /experiments /cache \
    && install -d /workspace && ln -s /experiments /workspace/experiments && ln -s /experiments /workspace/out \
    && ln -s /data/shards /workspace/shards && ln -s /data/datasets /workspace/datasets
COPY --from=wheels /opt/venv /opt/venv
COPY --chmod=755 docker/entry docker/healthcheck /usr/local/bin/
COPY configs /workspace/configs
ENV PATH=/opt/venv/bin:$PATH HOME=/cache USER=mambair PYTHONUNBUFFERED=1 CC=gcc \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The kernels of the Base and Light networks, 60 MB for a compute capability, so that no first step waits for them; the
# entry tells Triton's cache where they lie.
ARG KERNELS_FOR="9.0"
RUN for capability in $KERNELS_FOR; do \
        HOME=/tmp TRITON_CACHE_DIR=/opt/kernels python -m mambair_ds.compile --capability "$capability" \
            --config /workspace/configs/x2.yml /workspace/configs/denoise_50.yml /workspace/configs/x2_light.yml; \
    done
ARG VERSION=0.1.0 REVISION=unknown BASE_IMAGE
LABEL org.opencontainers.image.title="mambair-ds" \
      org.opencontainers.image.description="Train MambaIRv2 image restoration" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
WORKDIR /workspace
USER 1000:1000
VOLUME ["/data", "/experiments", "/cache"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=10s --start-period=120s CMD ["healthcheck"]
ENTRYPOINT ["tini", "--", "entry"]
