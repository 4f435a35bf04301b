"""Settings of the project."""

import os
from pathlib import Path

SECRET_KEY = "of an example"
DEBUG = True
ROOT_URLCONF = "proj.urls"
INSTALLED_APPS = ["core", "tasks"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).parents[1] / "documents.sqlite3"}
}

# The same server as embedq's workers. Leave both out, and `connect` takes embedq's own.
CELERY_BROKER_URL = CELERY_RESULT_BACKEND = os.environ["EMBEDQ_REDIS_URL"]
CELERY_TASK_DEFAULT_QUEUE = "proj"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
