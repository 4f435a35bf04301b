# `embedq flower`, `embedq exporter` and a producer's commands: what needs no torch. Build from the repository root:
#   docker build -f deploy/docker/tools.Dockerfile -t embedq-tools:0.2.0 .
FROM python:3.12.10-slim-bookworm

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE __init__.py __main__.py celeryconfig.py py.typed ./
COPY core core
COPY tasks tasks
COPY testing testing
COPY workers workers
COPY deploy deploy
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[flower,exporter]"

# With a name: Celery warns of users and groups that have none.
RUN groupadd --gid 10001 embedq && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp embedq
WORKDIR /embedq
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
CMD ["embedq", "models"]
