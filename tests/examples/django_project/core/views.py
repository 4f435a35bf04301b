"""Adds documents and finds them."""

import json

import numpy as np
from celery import chain
from django.http import HttpRequest, JsonResponse
from tasks.tasks import store

from core.models import Document
from embedq import tasks as embedq


def add(request: HttpRequest) -> JsonResponse:
    """Keep texts and have them embedded: answers at once with the job that ends when they can be found."""
    documents = [Document.objects.create(text=text) for text in json.loads(request.body)]
    ids = [document.pk for document in documents]
    job = chain(embedq.embed.s([document.text for document in documents]), store.s(ids)).delay()
    if request.GET.get("wait"):
        return JsonResponse({"stored": job.get(timeout=30)})
    return JsonResponse({"job": job.id})


def search(request: HttpRequest) -> JsonResponse:
    """The document nearest to the query."""
    query = embedq.embed.delay([request.GET["q"]]).get(timeout=30).dense[0]
    documents = list(Document.objects.exclude(vector=None))
    scores = [float(query @ np.frombuffer(document.vector, np.float32)) for document in documents]
    return JsonResponse({"text": documents[int(np.argmax(scores))].text, "score": max(scores)})
