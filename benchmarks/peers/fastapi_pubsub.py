"""The floor for `benchmarks.gateway`: FastAPI over a Redis list and one channel, and nothing else.

No durability, leases, tenants or streams: a request is pushed as JSON, a worker answers with 32 tokens, one subscriber
wakes the waiting requests. What a gateway costs beyond this is what it does beyond this.
`python -m benchmarks.peers.fastapi_pubsub serve|work <redis url> [port]`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis
import redis.asyncio
from pydantic import BaseModel

_JOBS, _ANSWERS = "floor:jobs", "floor:answers"
_AT_ONCE = 256


class Body(BaseModel):
    prompt_token_ids: list[int]
    max_tokens: int


def serve(url: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI

    broker = redis.asyncio.Redis.from_url(url, socket_timeout=None)
    waiting: dict[str, asyncio.Future[list[int]]] = {}

    async def listen() -> None:
        async with broker.pubsub() as channel:
            await channel.subscribe(_ANSWERS)
            async for message in channel.listen():
                if message["type"] == "message":
                    for job, token_ids in json.loads(message["data"]):
                        waiting.pop(job).set_result(token_ids)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        listening = asyncio.ensure_future(listen())
        yield
        listening.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/generate")
    async def generate(body: Body) -> dict[str, list[int]]:
        job = uuid.uuid4().hex
        answer = waiting[job] = asyncio.get_running_loop().create_future()
        await broker.rpush(_JOBS, json.dumps([job, body.prompt_token_ids, body.max_tokens]))
        return {"token_ids": await answer}

    uvicorn.run(app, port=port, log_level="error")


def work(url: str) -> None:
    broker = redis.Redis.from_url(url, socket_timeout=None)  # it blocks for as long as nothing comes
    while True:
        jobs = [broker.blpop([_JOBS])[1], *(broker.lpop(_JOBS, _AT_ONCE) or [])]
        broker.publish(_ANSWERS, json.dumps([[json.loads(job)[0], list(range(32))] for job in jobs]))


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3])) if sys.argv[1] == "serve" else work(sys.argv[2])
