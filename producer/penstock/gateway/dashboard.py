"""The pages: the dashboard at `/` and the description of the routes at `/docs`, each one file of the package.

They hold no data and need no key; what they show they ask of the other routes, the dashboard with the key its user
types. Nothing comes from elsewhere, and script and style are allowed by their hashes, so nothing that gets into a
page's text can run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


class _Page:
    def __init__(self, name: str) -> None:
        self._text = files("penstock.gateway").joinpath(name).read_text(encoding="utf-8")
        self._headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src {self._hashes('script')}; style-src {self._hashes('style')}; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def _hashes(self, tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", self._text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    def response(self) -> HTMLResponse:
        return HTMLResponse(self._text, headers=self._headers)


_DASHBOARD, _ROUTES = _Page("dashboard.html"), _Page("docs.html")

router = APIRouter()


@router.get("/", response_class=HTMLResponse, summary="The dashboard", include_in_schema=False)
async def dashboard() -> HTMLResponse:
    """The dashboard itself."""
    return _DASHBOARD.response()


@router.get("/docs", response_class=HTMLResponse, summary="The routes, for people", include_in_schema=False)
async def docs() -> HTMLResponse:
    """What /openapi.json says, to read."""
    return _ROUTES.response()
