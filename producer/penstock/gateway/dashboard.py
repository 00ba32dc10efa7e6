"""The dashboard at `/`: one page of the package.

The page holds no data and needs no key; what it shows it asks of the other routes, with the key its user types. Its
script and style are allowed by their hashes, so nothing that gets into the page's text can run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

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
