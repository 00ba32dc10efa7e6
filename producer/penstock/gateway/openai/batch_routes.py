"""`/v1/files` and `/v1/batches`: many requests in one file, answered in another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from penstock.gateway.access import Who
from penstock.gateway.openai.batches import BatchStore
from penstock.gateway.openai.files import MAX_FILE_BYTES, FileStore
from penstock.gateway.openai.objects import BatchObject, DeletedFile, FileObject, Page
from penstock.gateway.openai.routes import ERRORS, answers
from penstock_core.protocol.errors import InvalidRequest

T = TypeVar("T")

MAX_WINDOW_S = 7 * 86_400
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}

router = APIRouter(tags=["OpenAI"])


async def files_of(request: Request) -> FileStore:
    """Dependency: the process's files."""
    found: FileStore = request.app.state.files
    return found


async def batches_of(request: Request) -> BatchStore:
    """Dependency: the process's batches."""
    found: BatchStore = request.app.state.batches
    return found


Files = Annotated[FileStore, Depends(files_of)]
Batches = Annotated[BatchStore, Depends(batches_of)]
FileId = Annotated[str, Path(pattern=r"^file-[0-9a-f]{32}[oe]?$")]
BatchId = Annotated[str, Path(pattern=r"^batch_[0-9a-f]{32}$")]
Limit = Annotated[int, Query(ge=1, le=10_000)]
After = Annotated[str | None, Query(max_length=64)]


class BatchBody(BaseModel):
    """`POST /v1/batches`.

    Attributes:
        completion_window: such as 30m, 24h or 7d: requests that are not answered by then expire. A window of an hour or
            less runs at priority 3, a longer one at 1, unless a request says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_file_id: Annotated[str, StringConstraints(max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[str, StringConstraints(max_length=8)]
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None

    def window_s(self) -> int:
        """The window in seconds. Raises `InvalidRequest`."""
        found = _WINDOW.fullmatch(self.completion_window)
        seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
        if not 0 < seconds <= MAX_WINDOW_S:
            raise InvalidRequest(
                "completion_window", f"{self.completion_window!r}; write 30m, 24h or 7d, at most {MAX_WINDOW_S} s"
            )
        return seconds


@router.post("/v1/files", response_model=None, responses=answers(FileObject), summary="Upload a file of requests")
async def upload(
    request: Request,
    caller: Who,
    files: Files,
    file: Annotated[UploadFile, File(description="JSONL, one request per line")],
    purpose: Annotated[Literal["batch"], Form()],
) -> dict[str, Any]:
    """Kept for a week. Bounded by the gateway's largest body as well."""
    unknown = sorted(set(await request.form()) - {"file", "purpose"})
    if unknown:
        raise InvalidRequest(unknown[0], "unknown option; a file has file and purpose")
    if (file.size or 0) > MAX_FILE_BYTES:
        raise InvalidRequest("file", f"has {file.size} bytes, allowed are {MAX_FILE_BYTES}; split it")
    name = (file.filename or "upload.jsonl")[-255:]
    return (await files.add(caller.tenant, name, purpose, await file.read())).shown()


@router.get("/v1/files", response_model=None, responses=answers(Page[FileObject]), summary="Files of the tenant")
async def list_files(
    caller: Who,
    files: Files,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Limit = 10_000,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Newest first, unless asked otherwise."""
    found = [file for file in await files.of_tenant(caller.tenant) if purpose in (None, file.purpose)]
    ordered = found if order == "desc" else found[::-1]
    return _page(ordered, lambda file: file.file_id, lambda file: file.shown(), limit, after)


@router.get("/v1/files/{file_id}", response_model=None, responses=answers(FileObject), summary="One file")
async def file_of(file_id: FileId, caller: Who, files: Files) -> dict[str, Any]:
    """Its name, size and purpose."""
    return (await files.get(file_id, caller.tenant)).shown()


@router.get(
    "/v1/files/{file_id}/content",
    responses={
        **ERRORS,
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    },
    response_class=StreamingResponse,
    summary="A file's bytes",
)
async def content(file_id: FileId, caller: Who, files: Files) -> StreamingResponse:
    """As they were uploaded, or as the batch wrote them."""
    file = await files.get(file_id, caller.tenant)
    headers = {"X-Content-Type-Options": "nosniff", "Content-Length": str(file.size)}
    return StreamingResponse(files.pieces(file), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}", response_model=None, responses=answers(DeletedFile), summary="Delete a file")
async def delete(file_id: FileId, caller: Who, files: Files) -> dict[str, Any]:
    """A batch that has begun with it fails."""
    await files.delete(file_id, caller.tenant)
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/v1/batches", response_model=None, responses=answers(BatchObject), summary="Begin a batch")
async def create(body: BatchBody, request: Request, caller: Who, files: Files, batches: Batches) -> dict[str, Any]:
    """One job per line of the file; survives any gateway."""
    await files.get(body.input_file_id, caller.tenant)
    window_s = body.window_s()
    made = await batches.create(
        caller.tenant, body.endpoint, body.completion_window, window_s, body.input_file_id, body.metadata or {}
    )
    request.app.state.driver.ring()
    return made.shown()


@router.get("/v1/batches", response_model=None, responses=answers(Page[BatchObject]), summary="Batches of the tenant")
async def list_batches(caller: Who, batches: Batches, limit: Limit = 20, after: After = None) -> dict[str, Any]:
    """Newest first."""
    found = await batches.of_tenant(caller.tenant)
    return _page(found, lambda batch: batch.batch_id, lambda batch: batch.shown(), limit, after)


@router.get(
    "/v1/batches/{batch_id}", response_model=None, responses=answers(BatchObject), summary="Where a batch stands"
)
async def batch_of(batch_id: BatchId, caller: Who, batches: Batches) -> dict[str, Any]:
    """Status, counts, and once it has ended its files."""
    return (await batches.get(batch_id, caller.tenant)).shown()


@router.post(
    "/v1/batches/{batch_id}/cancel", response_model=None, responses=answers(BatchObject), summary="Cancel a batch"
)
async def cancel(batch_id: BatchId, caller: Who, batches: Batches) -> dict[str, Any]:
    """What is answered already stays in the output file."""
    return (await batches.ask_to_cancel(batch_id, caller.tenant)).shown()


def _page(
    found: Sequence[T], name: Callable[[T], str], show: Callable[[T], dict[str, Any]], limit: int, after: str | None
) -> dict[str, Any]:
    names = [name(one) for one in found]
    if after is not None and after not in names:
        raise InvalidRequest("after", f"{after!r} is not in this list")
    start = 0 if after is None else names.index(after) + 1
    taken = names[start : start + limit]
    return {
        "object": "list",
        "data": [show(one) for one in found[start : start + limit]],
        "first_id": taken[0] if taken else None,
        "last_id": taken[-1] if taken else None,
        "has_more": start + limit < len(found),
    }
