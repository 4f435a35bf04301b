# Flower, the exporter and the commands of `python -m tasks`: what a producer has, without torch. From the repository root:
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

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
CMD ["python", "-m", "tasks", "models"]
