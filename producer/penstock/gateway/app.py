"""The gateway as an ASGI application: settings in, FastAPI app out. Holds no state that Redis does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from penstock.aio import AsyncClient
from penstock.gateway import dashboard, errors, native
from penstock.gateway.body import BodyLimit
from penstock.gateway.books import Books
from penstock.gateway.closing import Closing
from penstock.gateway.description import describe
from penstock.gateway.handler import RequestHandler
from penstock.gateway.metrics import Measured, RequestMeters
from penstock.gateway.openai import background, batch_routes
from penstock.gateway.openai import routes as openai
from penstock.gateway.openai.batches import BatchStore
from penstock.gateway.openai.driver import BatchDriver
from penstock.gateway.openai.files import FileStore
from penstock.gateway.pool import bounded_connections
from penstock.gateway.settings import GatewaySettings
from penstock.settings import locate
from penstock_core import __version__


def create_app(settings: GatewaySettings) -> FastAPI:
    """An application that serves one queue. Raises `InvalidConfiguration`."""
    url, queue = locate(settings.url, settings.queue, None)
    broker = bounded_connections(url)
    client = AsyncClient(url, queue=queue, connection=broker)
    books = Books(broker, url, client.settings.keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            app.state.driver = BatchDriver(app.state.batches, client)
            driving = asyncio.ensure_future(app.state.driver.run())
            try:
                yield
            finally:
                while not driving.done():  # before Python 3.12 `wait_for` can swallow a cancellation
                    driving.cancel()
                    await asyncio.wait([driving], timeout=0.2)
                await broker.aclose()

    app = FastAPI(
        title="Penstock",
        version=__version__,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        summary="A durable LLM-generation queue: jobs in, token streams out, nothing lost in between.",
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.closing = Closing(settings.grace_s)
    app.state.handler = RequestHandler(client, books, app.state.closing, settings.limits.request_timeout_s)
    app.state.files = FileStore(books)
    app.state.batches = BatchStore(app.state.files)
    app.state.meters = RequestMeters()
    app.include_router(native.router)
    app.include_router(dashboard.router)
    app.include_router(openai.router)
    app.include_router(batch_routes.router)
    app.include_router(background.router)
    errors.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "traceparent"],
            expose_headers=["Location", "Retry-After"],
        )
    app.add_middleware(BodyLimit, limits=settings.limits)
    app.add_middleware(Measured, meters=app.state.meters)
    app.state.meters.know(describe(app)["paths"])
    return app
