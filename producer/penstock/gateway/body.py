"""A request's body, bounded in size and in time, before it is read into memory."""

from __future__ import annotations

import asyncio

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.gateway.settings import Limits


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, 408 for one that takes too long.

    Args:
        app: what comes behind it.
        limits: how large, and how long.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._too_large = (
            f"the request's body is larger than {limits.max_body_bytes} bytes; send less, or raise --max-body-bytes"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its bytes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        largest, until = self._limits.max_body_bytes, asyncio.get_running_loop().time() + self._limits.body_timeout_s
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > largest:
            body = {"message": self._too_large, "type": "invalid_request_error", "param": None, "code": "too_large"}
            await JSONResponse({"error": body}, 413, {"Connection": "close"})(scope, receive, send)
            return
        seen, whole = 0, False

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                late = f"the request's body was not here within {self._limits.body_timeout_s:g} s"
                raise HTTPException(408, late) from None  # FastAPI passes this kind on, and no other
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > largest:
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, counted, send)
