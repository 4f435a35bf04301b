"""The project's Celery application, as Celery's guide to Django has it, and one line of embedq."""

import os

from celery import Celery

from embedq.tasks import connect

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")

app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
connect(app)
