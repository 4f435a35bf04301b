# A worker on NVIDIA accelerators. Build from the repository root:
#   docker build -f deploy/docker/cuda.Dockerfile -t embedq-cuda:0.2.0 .
# The driver is the host's, mounted by NVIDIA's container runtime; CUDA's libraries come with torch.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:$PATH

WORKDIR /src
# torch first and alone, as in the Makefile: its build depends on the accelerator.
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir --disable-pip-version-check ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} ${TORCH}
COPY pyproject.toml setup.py constraints.txt README.md LICENSE __init__.py __main__.py celeryconfig.py py.typed ./
COPY core core
COPY tasks tasks
COPY testing testing
COPY workers workers
COPY deploy deploy
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[worker]"

# With a name: Celery warns of users and groups that have none.
RUN groupadd --gid 10001 embedq && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp embedq
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /embedq
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
# SIGTERM, which drains; whoever stops the container has to wait for EMBEDQ_DRAIN_TIMEOUT_S and more.
STOPSIGNAL SIGTERM
CMD ["embedq", "workers"]
