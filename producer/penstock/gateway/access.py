"""What every route depends on: who asks, and the process's handler. Coroutines, so that no request hops to a thread."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from penstock.gateway.auth import Caller, Forbidden
from penstock.gateway.handler import RequestHandler
from penstock.gateway.settings import GatewaySettings

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="API key",
    description="A key of a tenant or of an operator; none is asked for where the gateway has none configured.",
)


async def caller_of(
    request: Request, described: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> Caller:
    """The caller whose key came with the request. Raises `Unauthorized`, `TooManyRequests`."""
    settings: GatewaySettings = request.app.state.settings
    caller = settings.keys.caller_of(request.headers.get("authorization"))
    if caller.requests_per_minute:
        handler: RequestHandler = request.app.state.handler
        await handler.books.charge(caller)
    return caller


Who = Annotated[Caller, Depends(caller_of)]


async def operator_of(caller: Who) -> Caller:
    """The caller, if it is an operator. Raises `Forbidden`."""
    if not caller.is_operator:
        raise Forbidden("this needs an operator's key; yours is a tenant's")
    return caller


async def handler_of(request: Request) -> RequestHandler:
    """The process's handler."""
    handler: RequestHandler = request.app.state.handler
    return handler


Operator = Annotated[Caller, Depends(operator_of)]
Handler = Annotated[RequestHandler, Depends(handler_of)]
