"""Printing one job as it goes: text on stdout, everything else on stderr, JSON lines where asked for.

On a terminal a takeover is marked in the text where it happened: a coloured bar between the last token of the worker
that died and the first of the one that went on.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from penstock.cli.terminal import coloured, is_terminal, note, paint, printable, say
from penstock_core.protocol.errors import JobError, ResultTimeout

if TYPE_CHECKING:
    from penstock.client import JobHandle
    from penstock_core.protocol.events import TokenChunk
    from penstock_core.protocol.jobs import JobResult

_BAR = "\x1b[1;38;5;206m▌\x1b[0m"


class TextPrinter:
    """Writes chunks to stdout; several choices are kept apart and printed one after the other at the end."""

    def __init__(self, from_offset: int = 0) -> None:
        self._plain = not is_terminal(sys.stdout)
        self._marks = coloured(sys.stdout)
        self._attempt: int | None = None
        self._wrote_newline = True
        self.from_offset = from_offset
        self.tokens = 0
        self.next_offset = from_offset
        self.takeovers: list[int] = []
        self.first_token_at: float | None = None
        self.began = time.monotonic()

    def take(self, chunk: TokenChunk) -> None:
        """Print a chunk of choice 0."""
        if self._attempt is not None and chunk.attempt != self._attempt:
            self.takeovers.append(chunk.offset)
            if self._marks and not self._plain:
                sys.stdout.write(_BAR)
        self._attempt = chunk.attempt
        if chunk.token_ids and self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.tokens += len(chunk.token_ids)
        self.next_offset = chunk.end
        if chunk.text:
            text = chunk.text if self._plain else printable(chunk.text)
            sys.stdout.write(text)
            sys.stdout.flush()
            self._wrote_newline = text.endswith("\n") if text else self._wrote_newline

    def close(self) -> None:
        """End the last line, so that the prompt stands alone."""
        if not self._wrote_newline:
            sys.stdout.write("\n")
            sys.stdout.flush()


def follow(
    handle: JobHandle,
    *,
    live: bool,
    timeout_s: float | None,
    as_json: bool,
    announce: bool = False,
    from_offset: int = 0,
    index: int | None = None,
) -> None:
    """Print a job until its end; live or all at once.

    Raises the SDK's errors for a job that did not complete, after what it produced has been printed.
    """
    if as_json:
        _follow_json(handle, live, timeout_s, announce, from_offset, index)
        return
    if live:
        _stream(handle, timeout_s, announce, from_offset, index)
        return
    try:
        result = _awaited(handle, timeout_s, announce)
    except JobError as error:
        if error.result is not None:
            print_choices(error.result)
        raise
    print_choices(result)
    _summary(handle, result)


def _follow_json(
    handle: JobHandle, live: bool, timeout_s: float | None, announce: bool, from_offset: int, index: int | None
) -> None:
    from penstock.cli.records import chunk_record, outcome_record
    from penstock.cli.screen import print_json

    if live and announce:
        print_json({"event": "submitted", "job_id": handle.id, "duplicate": handle.duplicate})
    failure: JobError | None = None
    result: JobResult | None = None
    told: dict[str, str] | None = None
    try:
        if live:
            for chunk in handle.stream(from_offset, index, timeout_s):
                print_json(chunk_record(handle.id, chunk))
        result = handle.result(timeout_s)
    except JobError as error:
        failure, result = error, error.result
        told = {"code": error.code, "message": error.message}
    status = handle.status()
    record = outcome_record(handle.id, str(status.state), status.attempt, result, told)
    print_json({"event": "ended", **record} if live else record)
    if failure is not None:
        raise failure


def _stream(handle: JobHandle, timeout_s: float | None, announce: bool, from_offset: int, index: int | None) -> None:
    printer = TextPrinter(from_offset)
    chosen = 0 if index is None else index
    if announce and is_terminal(sys.stderr):
        say(paint(handle.id, "dim", on=coloured(sys.stderr)))
    try:
        for chunk in handle.stream(from_offset, index, timeout_s):
            if chunk.index == chosen:
                printer.take(chunk)
        result = handle.result(timeout_s)
    except KeyboardInterrupt:
        printer.close()
        note("·", "dim", f"the job goes on: `penstock watch {handle.id} --from {printer.next_offset}`, "
                         f"or end it: `penstock cancel {handle.id}`")  # fmt: skip
        raise
    except BaseException:
        printer.close()
        raise
    printer.close()
    if index is None and len(result.choices) > 1:
        print_choices(result, leave_out=chosen)
    _summary(handle, result, printer)


def _awaited(handle: JobHandle, timeout_s: float | None, announce: bool) -> JobResult:
    from penstock.cli.screen import console

    began = time.monotonic()
    try:
        if not is_terminal(sys.stderr):
            return handle.result(timeout_s)
        with console(stderr=True).status("", spinner="dots") as spinner:
            while True:
                waited = time.monotonic() - began
                spinner.update(f"[id]{handle.id}[/] [label]waiting {waited:.0f} s[/]" if announce else "waiting")
                left = None if timeout_s is None else timeout_s - waited
                try:
                    return handle.result(1.0 if left is None else max(0.0, min(1.0, left)))
                except ResultTimeout:
                    if left is not None and left <= 1.0:
                        raise
    except KeyboardInterrupt:
        note("·", "dim", f"the job goes on: `penstock result {handle.id}`, or end it: `penstock cancel {handle.id}`")
        raise


def print_choices(result: JobResult, leave_out: int | None = None) -> None:
    """Print the texts of a result; with a heading each where there are several."""
    several = len(result.choices) > 1
    on = coloured(sys.stdout)
    for choice in result.choices:
        if choice.index == leave_out:
            continue
        if several:
            print(paint(f"── {choice.index} ── {choice.finish_reason}", "cyan", on=on))
        text = choice.text if not is_terminal(sys.stdout) else printable(choice.text)
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
    sys.stdout.flush()


def _summary(handle: JobHandle, result: JobResult, printer: TextPrinter | None = None) -> None:
    """One line about the job, for a person who looks at the terminal."""
    if not is_terminal(sys.stderr):
        return
    usage, timings = result.usage, result.timings
    parts = [f"{usage.completion_tokens} tokens"]
    if timings.decode_ms > 0 and usage.completion_tokens > 1:
        parts.append(f"{usage.completion_tokens / (timings.decode_ms / 1000):,.0f} tokens/s")
    if timings.ttft_ms > 0:
        parts.append(f"first after {timings.ttft_ms:,.0f} ms")
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens from the prefix cache")
    if timings.drafted_tokens:
        parts.append(f"{timings.accepted_tokens} of {timings.drafted_tokens} drafts accepted")
    if result.choices:
        parts.append(f"finished: {result.choices[0].finish_reason}")
    if result.worker:
        parts.append(result.worker)
    parts += [f"taken over at token {offset}" for offset in (printer.takeovers if printer is not None else ())]
    on = coloured(sys.stderr)
    say(f"{paint('✓', 'green', 'bold', on=on)} {paint(' · '.join(parts), 'dim', on=on)}")
