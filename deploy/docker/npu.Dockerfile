# A worker on Ascend accelerators. Build from the repository root, on the architecture of the host:
#   docker build -f deploy/docker/npu.Dockerfile -t embedq-npu:0.2.0 .
# The driver is the host's, mounted by Ascend's container runtime; CANN is the image's. torch and torch_npu must be of one
# version, and that version one which this CANN supports: change the three together.
FROM quay.io/ascend/cann:8.1.rc1-910b-ubuntu22.04-py3.11

WORKDIR /src
ARG TORCH="torch==2.6.0 torch-npu==2.6.0"
ARG TORCH_INDEX=""
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:$PATH
RUN pip install --no-cache-dir --disable-pip-version-check ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} ${TORCH}
COPY pyproject.toml setup.py constraints.txt README.md LICENSE __init__.py __main__.py celeryconfig.py py.typed ./
COPY core core
COPY tasks tasks
COPY testing testing
COPY workers workers
COPY deploy deploy
# What torch_npu imports without saying so.
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt pyyaml numpy scipy decorator attrs psutil \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[worker]"

# With a name: Celery warns of users and groups that have none.
RUN groupadd --gid 10001 embedq && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp embedq
WORKDIR /embedq
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# The group that may open the host's devices.
USER 10001:1000
# SIGTERM, which drains; whoever stops the container has to wait for EMBEDQ_DRAIN_TIMEOUT_S and more.
STOPSIGNAL SIGTERM
# CANN's variables are set by its script, and a process must be born with them. `exec`: SIGTERM is for Python.
ENTRYPOINT ["bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && exec \"$@\"", "--"]
CMD ["embedq", "workers"]
