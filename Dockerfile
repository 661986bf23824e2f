# denoise-rl in a container, for CPUs and for NVIDIA GPUs:
#   docker build --target cpu --tag denoise-rl:cpu .
#   docker build --target cuda --tag denoise-rl:cuda .
#   docker run --rm --volume "$PWD/runs:/work/runs" denoise-rl:cpu train --config quickstart
#   docker run --rm --gpus all --ipc host --volume "$PWD/runs:/work/runs" denoise-rl:cuda check --config quickstart
# The sandbox of code rewards needs user namespaces: --security-opt seccomp=unconfined, or it takes its second way
# (docs/sandbox.md). Built from a clone; a compiler is there for what torch and DeepSpeed compile on a GPU.

FROM python:3.11-slim AS base
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git openssh-client pdsh && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY rewards rewards
COPY rollouts rollouts
COPY rl rl
COPY scripts /work/scripts

FROM base AS cpu
RUN pip install --constraint constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt '.[images,tensorboard]'
WORKDIR /work
ENTRYPOINT ["denoise-rl"]
CMD ["--help"]

# The wheel of torch brings CUDA's libraries; the host brings the driver.
FROM base AS cuda
RUN pip install --constraint constraints.txt torch
RUN pip install --constraint constraints.txt '.[images,tensorboard,ray]'
WORKDIR /work
ENTRYPOINT ["denoise-rl"]
CMD ["--help"]
