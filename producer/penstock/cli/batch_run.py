"""The work of `penstock batch`: a window of jobs in the queue, answers appended in the input's order.

The output file always holds answers of a beginning of the input, so a second run goes on behind its last line. An
interruption cancels what is in the queue. A run that is killed cannot; it leaves its name in a small file beside the
output. Idempotency keys are made from the name, so the next run finds the jobs that are in the queue already.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from penstock.aio import AsyncClient, AsyncJobHandle
from penstock.cli.exits import ExitCode, invalid
from penstock.cli.records import outcome_record
from penstock.cli.session import Address
from penstock.gateway.openai.generation import Generation, item
from penstock.gateway.openai.lines import ENDPOINTS, Line, answered, refused
from penstock.submission import KNOWN_OPTIONS, prepare
from penstock_core.protocol.errors import InvalidRequest, JobError, PenstockError, QueueFull

_STEP = 64
_RUN_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input; `endpoint` is None where it holds submit's keywords."""

    custom_id: str
    given: dict[str, Any]
    endpoint: str | None


@dataclass(slots=True)
class Summary:
    """What `--json` prints."""

    total: int
    skipped: int
    completed: int = 0
    failed: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def record(self, output: Path) -> dict[str, Any]:
        """The summary as JSON."""
        elapsed_s = time.perf_counter() - self.started
        return {
            "output": str(output),
            "total": self.total,
            "skipped": self.skipped,
            "completed": self.completed,
            "failed": self.failed,
            "completion_tokens": self.completion_tokens,
            "seconds": round(elapsed_s, 3),
            "tokens_per_s": round(self.completion_tokens / elapsed_s, 1),
        }


def read_requests(source: Path) -> list[Request]:
    """All lines of the input; a bad one is refused before anything is submitted."""
    try:
        data = source.read_bytes()
    except OSError as error:
        invalid("INPUT", f"{source}: {error.strerror}")
    requests: list[Request] = []
    seen: set[str] = set()
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            loaded = json.loads(raw)
        except (ValueError, RecursionError):
            invalid(f"line {number}", "is not JSON in UTF-8")
        if not isinstance(loaded, dict):
            invalid(f"line {number}", "is no JSON object")
        request = _request(loaded, number)
        if request.custom_id in seen:
            invalid(f"line {number}", f"custom_id {request.custom_id!r} is used twice")
        seen.add(request.custom_id)
        requests.append(request)
    if not requests:
        invalid("INPUT", f"{source} has no requests; write one JSON object per line")
    return requests


def _request(loaded: dict[str, Any], number: int) -> Request:
    custom_id = loaded.pop("custom_id", f"line-{number}")
    if not isinstance(custom_id, str) or not custom_id:
        invalid(f"line {number}", f"custom_id is no string: {custom_id!r}")
    if "body" in loaded:
        endpoint, body = loaded.get("url"), loaded["body"]
        unknown = sorted(set(loaded) - {"method", "url", "body"})
        if unknown:
            invalid(f"line {number}", f"{unknown[0]!r} is unknown beside custom_id, method, url and body")
        if endpoint not in ENDPOINTS or loaded.get("method", "POST") != "POST" or not isinstance(body, dict):
            invalid(f"line {number}", f"needs method POST, a body, and a url of {', '.join(ENDPOINTS)}")
        return Request(custom_id, body, endpoint)
    unknown = sorted(set(loaded) - KNOWN_OPTIONS)
    if unknown:
        invalid(f"line {number}", f"{unknown[0]!r} is no option of a job; check its spelling")
    return Request(custom_id, loaded, None)


def answered_ids(output: Path) -> set[str]:
    """custom_ids that the output file has; a last line that was cut off is removed."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found = {json.loads(line)["custom_id"] for line in whole.splitlines() if line.strip()}
    except (ValueError, KeyError, TypeError):
        invalid("--output", f"{output} exists and is no output of this command; name another file")
    if len(whole) < len(data):
        os.truncate(output, len(whole))
    return found


@contextmanager
def _named_run(output: Path) -> Iterator[str]:
    """The name of the run that fills this output: an earlier one's that was killed, or a new one."""
    note = output.with_name(output.name + ".run")
    name = note.read_text().strip() if note.exists() else ""
    if not _RUN_NAME.fullmatch(name):
        name = uuid.uuid4().hex
        note.write_text(name + "\n")
    try:
        yield name
    finally:
        note.unlink(missing_ok=True)


def run_batch(
    address: Address, source: Path, output: Path, priority: int, tenant: str, window: int, *, as_json: bool
) -> int:
    """Run what the output file lacks; returns the exit code."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from penstock.cli.screen import console, print_json
    from penstock.cli.terminal import is_terminal, note

    requests = read_requests(source)
    done = answered_ids(output)
    left = [request for request in requests if request.custom_id not in done]
    summary = Summary(len(requests), len(requests) - len(left))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}", style="mute"),
    )  # fmt: skip
    shown = Progress(*columns, console=console(stderr=True), transient=True, disable=not is_terminal(sys.stderr))
    with shown as progress:
        task = progress.add_task("batch", total=len(requests), completed=summary.skipped, rate="")

        def report() -> None:
            rate = summary.completion_tokens / (time.perf_counter() - summary.started)
            progress.update(
                task, completed=summary.skipped + summary.completed + summary.failed, rate=f"{rate:,.0f} tokens/s"
            )

        try:
            with output.open("ab") as file, _named_run(output) as name:
                runner = Runner(summary, file, name, priority, tenant, window, report)
                asyncio.run(runner.run(address, left))
        except OSError as error:
            if error.filename not in (str(output), f"{output}.run"):
                raise
            invalid("--output", f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            answered = summary.skipped + summary.completed + summary.failed
            stands = f"{answered} of {len(requests)} are answered in {output}"
            note("·", "dim", f"{stands}, the others are cancelled; the same command goes on there")
            raise
    record = summary.record(output)
    if as_json:
        print_json(record)
    else:
        mark = ("✓", "green") if not summary.failed else ("!", "yellow")
        skipped = f", {summary.skipped} were there already" if summary.skipped else ""
        note(*mark, f"{summary.completed} completed, {summary.failed} failed{skipped}: {output}")
    return ExitCode.JOB_FAILED if summary.failed else ExitCode.OK


class Runner:
    """Keeps a window of jobs in the queue and writes their answers; cancels them when it is interrupted."""

    def __init__(
        self, summary: Summary, file: BinaryIO, name: str, priority: int, tenant: str, window: int, report: Any
    ) -> None:
        self._summary = summary
        self._file = file
        self._name = name
        self._priority = priority
        self._tenant = tenant
        self._window = window
        self._report = report
        self._open: deque[tuple[asyncio.Task[tuple[bytes, bool, int]], AsyncJobHandle | None]] = deque()
        self._ahead: list[AsyncJobHandle] = []  # stored, but not in hand: behind a refused line, or interrupted

    async def run(self, address: Address, requests: list[Request]) -> None:
        """Answer the requests in order."""
        following = 0
        async with AsyncClient(address.url, queue=address.queue) as client:
            try:
                while following < len(requests) or self._open:
                    room = min(self._window - len(self._open), _STEP)
                    wait_s = 0.0
                    if room and following < len(requests):
                        taken, wait_s = await self._submit(client, requests[following : following + room])
                        following += taken
                    if not self._open:
                        await asyncio.sleep(wait_s)
                    elif following == len(requests) or len(self._open) >= self._window or wait_s:
                        await asyncio.wait({self._open[0][0]}, timeout=wait_s or None)
                    self._write()
            finally:
                handles = [handle for task, handle in self._open if handle is not None and not task.done()]
                handles += self._ahead
                for task, _ in self._open:
                    task.cancel()
                await asyncio.gather(*(handle.cancel() for handle in handles), return_exceptions=True)
                await asyncio.gather(*(task for task, _ in self._open), return_exceptions=True)

    def _write(self) -> None:
        """Append the answers at the head of the window."""
        while self._open and self._open[0][0].done():
            line, good, tokens = self._open.popleft()[0].result()
            self._file.write(line)
            self._summary.completed += good
            self._summary.failed += not good
            self._summary.completion_tokens += tokens
            if not self._open or not self._open[0][0].done():
                self._file.flush()
        self._report()

    async def _submit(self, client: AsyncClient, requests: list[Request]) -> tuple[int, float]:
        """Submit some; returns how many are in hand, and how long to wait where the queue is full."""
        prepared: list[Any] = []
        items: list[dict[str, Any]] = []
        for request in requests:
            try:
                work, options = self._prepare(request)
                prepare(client.settings, options)  # a bad line has its error in its place; the others run
                items.append(options)
                prepared.append(work)
            except InvalidRequest as error:
                prepared.append(error)
        outcomes = iter(await self._store(client, items) if items else [])
        for taken, (request, work) in enumerate(zip(requests, prepared, strict=True)):
            if isinstance(work, InvalidRequest):
                self._open.append((asyncio.ensure_future(_given(_refusal(request, work))), None))
                continue
            handle = next(outcomes)
            if isinstance(handle, QueueFull):
                self._ahead = [outcome for outcome in outcomes if isinstance(outcome, AsyncJobHandle)]
                return taken, min(5.0, max(0.2, handle.retry_after_s))
            self._open.append((asyncio.ensure_future(_answer(request, work, handle)), handle))
        return len(requests), 0.0

    async def _store(self, client: AsyncClient, items: list[dict[str, Any]]) -> list[AsyncJobHandle | QueueFull]:
        """Submit these. An interruption waits for the reply: what has been stored by then is to be cancelled."""
        storing = asyncio.ensure_future(client.submit_many(items))
        try:
            outcomes = await asyncio.shield(storing)
        except asyncio.CancelledError:
            with suppress(PenstockError):
                self._ahead += [outcome for outcome in await storing if isinstance(outcome, AsyncJobHandle)]
            raise
        self._ahead = []
        return outcomes

    def _prepare(self, request: Request) -> tuple[Any, dict[str, Any]]:
        content = json.dumps([request.custom_id, request.endpoint, request.given], sort_keys=True).encode()
        key = f"batch:{self._name}:{hashlib.sha256(content).hexdigest()}"
        if request.endpoint is None:
            own = {"priority": self._priority, "tenant": self._tenant, "idempotency_key": key}
            return None, {**own, **request.given}
        body = Line(request.custom_id, request.given).parsed(request.endpoint)
        priority = self._priority if body.priority is None else body.priority
        return body, item(body.jobs()[0], body.delivery(self._tenant, priority=priority, idempotency_key=key))


async def _given(answer: bytes) -> tuple[bytes, bool, int]:
    return answer, False, 0


def _refusal(request: Request, error: InvalidRequest) -> bytes:
    if request.endpoint is not None:
        return refused(Line(request.custom_id, {}), error)
    failure = {"code": "invalid_request", "message": str(error)}
    return _native(request, outcome_record("", "refused", None, None, failure))


async def _answer(request: Request, body: Any, handle: AsyncJobHandle) -> tuple[bytes, bool, int]:
    """The output line, whether it is an answer, and its tokens."""
    line = Line(request.custom_id, {})
    try:
        if body is not None:
            whole = await Generation(body, [handle], timeout_s=None, keep=True).whole()
            return answered(line, handle.id, whole), True, whole["usage"]["completion_tokens"]
        result = await handle.result()
    except JobError as error:
        if body is not None:
            return refused(line, error), False, 0
        failure = {"code": error.code, "message": error.message}
        return _native(request, outcome_record(handle.id, "failed", None, error.result, failure)), False, 0
    record = outcome_record(handle.id, "completed", None, result, None)
    return _native(request, record), True, result.usage.completion_tokens


def _native(request: Request, record: dict[str, Any]) -> bytes:
    return json.dumps({"custom_id": request.custom_id, **record}, ensure_ascii=False).encode() + b"\n"
