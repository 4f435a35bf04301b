# A worker on cores. Build from the repository root:
#   docker build -f deploy/docker/cpu.Dockerfile -t embedq-cpu:0.2.0 .
FROM python:3.12.10-slim-bookworm

WORKDIR /src
# torch first and alone, as in the Makefile: its build depends on the accelerator. TORCH_INDEX names an
# index of builds without any, if the usual one would bring CUDA along.
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
WORKDIR /embedq
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
# SIGTERM, which drains; whoever stops the container has to wait for EMBEDQ_DRAIN_TIMEOUT_S and more.
STOPSIGNAL SIGTERM
CMD ["embedq", "workers"]
