"""The dashboard at `/`: one page of the package, and the one action that only it needs.

The page holds no data and needs no key; what it shows it asks of the other routes, with the key its user types. Its
script and style are allowed by their hashes, so nothing that gets into the page's text can run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from penstock.gateway.models import ErrorBody
from penstock.gateway.native import ERRORS, Handler, JobId, Tenant
from penstock_core.protocol.connection import broker_errors
from penstock_core.protocol.transitions import requeue, run_async

_PAGE = files("penstock.gateway").joinpath("dashboard.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.get("/", response_class=HTMLResponse, summary="The dashboard", include_in_schema=False)
async def page() -> HTMLResponse:
    """The page itself."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.post(
    "/v1/jobs/{job_id}/requeue", responses={**ERRORS, 404: {"model": ErrorBody}}, summary="Put a dead job back in line"
)
async def put_back(job_id: JobId, request: Request, tenant: Tenant, handler: Handler) -> dict[str, Any]:
    """`requeued`, or `not_dead` where there was nothing to do."""
    await handler.status(job_id, tenant)
    store = request.app.state.files
    with broker_errors(store.url):
        outcome = (await run_async(store.redis, requeue(store.keys, [job_id])))[0]
    return {"id": job_id, "outcome": outcome}
