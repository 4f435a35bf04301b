# Flower, the exporter and the commands of `python -m embedq.tasks`: what a producer has, without torch. From the repository root:
#   docker build -f deploy/docker/tools.Dockerfile -t embedq-tools:0.1.0 .
FROM python:3.12.10-slim-bookworm

WORKDIR /embedq
COPY pyproject.toml constraints.txt README.md LICENSE celeryconfig.py ./
COPY core core
COPY tasks tasks
COPY workers workers
COPY deploy deploy
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -e ".[flower,exporter]" \
    && python -m compileall -q core tasks deploy

# With a name: Celery warns of users and groups that have none.
RUN groupadd --gid 10001 embedq && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp embedq
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
CMD ["python", "-m", "embedq.tasks", "models"]
