"""The gateway as an ASGI application: settings in, FastAPI app out. Holds no state that Redis does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.aio import AsyncClient
from penstock.gateway import dashboard, errors, native
from penstock.gateway.handler import RequestHandler
from penstock.gateway.metrics import Measured, RequestMeters
from penstock.gateway.openai import batch_routes
from penstock.gateway.openai import routes as openai
from penstock.gateway.openai.batches import BatchStore
from penstock.gateway.openai.driver import BatchDriver
from penstock.gateway.openai.files import FileStore
from penstock.gateway.settings import GatewaySettings
from penstock_core import __version__


def create_app(settings: GatewaySettings) -> FastAPI:
    """An application that serves one queue. Raises `InvalidConfiguration`."""
    client = AsyncClient(settings.url, queue=settings.queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            files = FileStore(client.settings.url, client.settings.keys)
            app.state.files, app.state.batches = files, BatchStore(files)
            app.state.driver = BatchDriver(app.state.batches, client)
            driving = asyncio.ensure_future(app.state.driver.run())
            try:
                yield
            finally:
                driving.cancel()
                await asyncio.gather(driving, return_exceptions=True)
                await files.close()

    app = FastAPI(
        title="Penstock",
        version=__version__,
        summary="A durable LLM-generation queue: jobs in, token streams out, nothing lost in between.",
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.handler = RequestHandler(client)
    app.state.meters = RequestMeters()
    app.include_router(native.router)
    app.include_router(dashboard.router)
    app.include_router(openai.router)
    app.include_router(batch_routes.router)
    errors.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Measured, meters=app.state.meters)
    app.state.meters.know(app.openapi()["paths"])
    return app


class BodyLimit:
    """Answers 413 to a request whose body is larger than allowed, before it is read into memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its bytes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise _TooLarge
            return message

        try:
            await self._app(scope, counted, send)
        except _TooLarge:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request's body is larger than {self._max_bytes} bytes; send less, or raise --max-body-bytes"
        refusal = JSONResponse({"error": {"code": "too_large", "message": message}}, 413)
        await refusal(scope, receive, send)


class _TooLarge(Exception):
    pass
