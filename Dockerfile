# syntax=docker/dockerfile:1
# iwm with DALI and PyPI's torch, which are built for CUDA 13 (GPU driver 580 or newer) and bring their CUDA libraries.
#
#   docker build -t iwm .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" iwm train demo --data.shards data/photos
#   docker run … --entrypoint torchrun iwm --nproc_per_node 8 -m iwm.train demo --data.shards data/photos
#
# --ipc=host: NCCL, between several GPUs, needs more shared memory than a container's 64 MB.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# torch.compile and Triton call a C and C++ compiler, and need Python's headers. Ubuntu's archive has only the newest
# version of a package, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/iwm
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip /opt/iwm/bin/pip install '/src[cuda13,wandb]'

# Caches of compiled kernels and of matplotlib must be writable for any user of --user, who need not have an account.
RUN useradd --create-home --uid 10001 iwm && mkdir /work && chown iwm /work && chmod 1777 /home/iwm
ENV PATH=/opt/iwm/bin:$PATH HOME=/home/iwm USER=iwm
USER 10001
WORKDIR /work
ENTRYPOINT ["iwm"]
CMD ["--help"]
