"""The service: `uvicorn app.main:api`."""

from celery import chain
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from app.worker import count
from embedq import tasks
from embedq.core.errors import ProducerError

api = FastAPI()


class Question(BaseModel):
    """A query and the passages that may answer it."""

    query: str
    passages: list[str]


@api.exception_handler(ProducerError)
async def refuse(request: Request, error: ProducerError) -> JSONResponse:
    """An error of the caller's, in embedq's words: they never hold a text."""
    return JSONResponse({"error": str(error)}, status_code=422)


@api.post("/embed")
async def embed(texts: list[str], model: str | None = None) -> list[list[float]]:
    """The texts' vectors. Sending is a round trip to Redis, which must not hold up the event loop."""
    job = await run_in_threadpool(tasks.embed.delay, texts, model=model)
    vectors = await tasks.aget(job, timeout=30)
    return [vector.tolist() for vector in vectors.dense]


@api.post("/rank")
async def rank(question: Question) -> list[str]:
    """The passages, best first."""
    job = await run_in_threadpool(tasks.rerank.delay, question.query, question.passages)
    ranking = await tasks.aget(job, timeout=30)
    return [question.passages[index] for index in ranking.order]


@api.post("/count")
def count_texts(texts: list[str]) -> int:
    """The number of vectors that came to the service's own worker. A plain function may wait: it runs in a thread."""
    return chain(tasks.embed.s(texts), count.s()).delay().get(timeout=30)
