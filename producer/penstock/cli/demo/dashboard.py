"""The live picture of a demo run: streams coloured by the worker that wrote them, the queue, the workers, the story.

A pure function from `Stage` to a renderable; draws nothing by itself.
"""

from __future__ import annotations

from rich.align import Align
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.cli.demo.stage import Performer, Segment, Stage, Stream
from penstock.cli.screen import STATE_MARKS, bar, duration, sparkline
from penstock.cli.terminal import printable

TENANT_COLOURS = {"chat": "#ff87af", "bedtime": "#ffd787", "library": "#87afd7"}
TAKEOVER_MARK = "▌"
_UNKNOWN = "#bcbcbc"
_MOMENT_STYLES = {"plain": "mute", "kill": "bad", "takeover": "takeover", "good": "good", "bad": "bad"}
_MOMENT_MARKS = {"plain": "·", "kill": "✗", "takeover": TAKEOVER_MARK, "good": "✓", "bad": "✗"}


def picture(stage: Stage, width: int, height: int) -> RenderableType:
    """The whole dashboard in at most `height` lines of `width` columns."""
    roomy = height >= 30
    spotlight_lines = max(3, min(7, height // 5))
    priorities = sorted({stream.part.priority for stream in stage.streams.values()}, reverse=True)
    lower_lines = max(len(priorities), len(stage.performers), 2) + 2
    moments = 4 if roomy else 2
    rows = max(4, height - spotlight_lines - 2 - lower_lines - moments - 5)
    parts: list[RenderableType] = [
        _header(stage, width),
        _streams(stage, width, rows),
        _spotlight(stage, width, spotlight_lines),
        _lower(stage, width, priorities),
        _story(stage, width, moments),
    ]
    return Group(*parts)


def _colour(stage: Stage, worker: str | None) -> str:
    performer = stage.performers.get(worker or "")
    return performer.colour if performer else _UNKNOWN


def _header(stage: Stage, width: int) -> RenderableType:
    left = Text.assemble((" ≋ penstock ", "brand"), ("demo", "bold"), ("  ", ""))
    details = [part for part in (stage.model, stage.broker) if part]
    left.append("  ·  ".join(details), style="mute")
    right = Text(f"{stage.now():.1f} s ", style="figure")
    left.truncate(max(10, width - right.cell_len - 1), overflow="ellipsis")
    left.append(" " * max(1, width - left.cell_len - right.cell_len))
    return left + right


def _streams(stage: Stage, width: int, rows: int) -> Panel:
    chosen = _choose(stage, rows)
    inner = width - 4
    lines = [_row(stage, stream, inner) for stream in chosen]
    lines += [Text("")] * (rows - len(lines))
    counts = Text.assemble(
        (f"{stage.count('running')} running", "state.running"),
        (" · ", "mute"),
        (f"{stage.count('queued')} waiting", "mute"),
        (" · ", "mute"),
        (f"{stage.count('completed')} done", "state.completed"),
    )
    lines_text = Text("\n", no_wrap=True, overflow="crop").join(lines)
    return Panel(
        lines_text, title=Text(" streams ", "title"), title_align="left", subtitle=counts, subtitle_align="right",
        border_style="frame", padding=(0, 1), height=rows + 2,
    )  # fmt: skip


def _choose(stage: Stage, rows: int) -> list[Stream]:
    """Streams worth a row: the interrupted first, then running, then just finished; in the order of submission."""

    def rank(stream: Stream) -> tuple[int, float]:
        if stream.held_at_kill:
            return (0, 0.0)
        if stream.state == "running":
            return (1, stream.first_token_s or 0.0)
        if stream.is_over:
            return (2, -(stream.ended_s or 0.0))
        return (3, -stream.part.priority)

    best = sorted(stage.streams.values(), key=rank)[:rows]
    return sorted(best, key=lambda stream: stream.part.number)


def _row(stage: Stage, stream: Stream, width: int) -> Text:
    mark = STATE_MARKS.get(stream.state, "·")
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{mark} ", style=f"state.{stream.state}")
    line.append(f"p{stream.part.priority} ", style="figure" if stream.part.priority >= 8 else "mute")
    line.append(f"{stream.part.tenant:<8.8}", style=TENANT_COLOURS.get(stream.part.tenant, "mute"))
    cells = 16 if width >= 84 else 10
    line.append_text(_progress(stage, stream, cells))
    line.append(f"{stream.tokens:>4} ", style="mute")
    room = width - line.cell_len
    if stream.tokens:
        line.append_text(tail(stage, stream, room))
    else:
        line.append(stream.part.title[:room], style="italic #6c6c6c")
    return line


def _progress(stage: Stage, stream: Stream, cells: int) -> Text:
    """How far the stream is; each worker's share in its colour, the takeover as a bar across."""
    total = max(1, stream.tokens if stream.is_over else stream.part.max_tokens)
    row = [("─", "frame")] * cells
    tokens = 0
    for number, segment in enumerate(stream.segments):
        first = tokens * cells // total
        tokens += segment.tokens
        for cell in range(first, min(cells, -(-tokens * cells // total))):
            row[cell] = ("━", _colour(stage, segment.worker))
        if number:
            row[min(first, cells - 1)] = ("┃", "takeover")
    text = Text(" ")
    for character, style in row:
        text.append(character, style=style)
    return text


def tail(stage: Stage, stream: Stream, room: int) -> Text:
    """The end of a stream's text in `room` cells, each part in the colour of the worker that wrote it."""
    pieces: list[tuple[str, str]] = []
    for number, segment in enumerate(stream.segments):
        if number:
            pieces.append((TAKEOVER_MARK, "takeover"))
        pieces.append((_flat(segment.text), _colour(stage, segment.worker)))
    whole = Text.assemble(*pieces)
    if whole.cell_len <= room:
        return whole
    kept = whole[max(0, len(whole) - room + 1) :]
    while kept.cell_len > room - 1:
        kept = kept[1:]
    return Text("…", style="mute") + kept


def _flat(text: str) -> str:
    return " ".join(printable(text).split("\n")).replace("  ", " ")


def _spotlight(stage: Stage, width: int, lines: int) -> Panel:
    stream = stage.streams.get(stage.spotlight or "")
    body: RenderableType = Text("waiting for the first tokens", style="italic #6c6c6c")
    title = Text(" one stream, whole ", style="title")
    if stream is not None and stream.tokens:
        body = _whole(stage, stream, width - 4, lines)
        title.append(f"{stream.part.tenant} {stream.job_id[-8:]} ", style="mute")
    return Panel(body, title=title, title_align="left", border_style="frame", padding=(0, 1), height=lines + 2)


def _whole(stage: Stage, stream: Stream, width: int, lines: int) -> RenderableType:
    """The text so far; its end, or from the takeover on where that would scroll away."""
    text = Text()
    for number, segment in enumerate(stream.segments):
        if number:
            text.append_text(_handover(stream, stream.segments[number - 1], segment))
        text.append(_flat(segment.text), style=_colour(stage, segment.worker))
    if not stream.is_over:
        text.append("▍", style="blink")
    wrapped = text.wrap(Console(width=width, color_system=None), width)
    start = max(0, len(wrapped) - lines)
    if len(stream.segments) > 1:
        handover = max((number for number, line in enumerate(wrapped) if TAKEOVER_MARK in line.plain), default=0)
        start = min(start, max(0, handover - 1))
    return Text("\n").join(wrapped[start : start + lines])


def _handover(stream: Stream, before: Segment, after: Segment) -> Text:
    pause = ""
    if stream.resumed_s is not None:
        pause = f" at token {stream.tokens - after.tokens + 1}"
    words = f" {before.worker} died, {after.worker or 'another'} goes on{pause} "
    return Text.assemble(" ", (TAKEOVER_MARK, "takeover"), (words, "handover"), " ")


def _lower(stage: Stage, width: int, priorities: list[int]) -> RenderableType:
    table = Table.grid(expand=True)
    narrow = width < 90
    table.add_column(width=26 if narrow else 34)
    table.add_column(ratio=1)
    lines = max(len(priorities), len(stage.performers), 2)
    table.add_row(
        _queue(stage, priorities, lines, 20 if narrow else 28),
        _workers(stage, lines, width - (26 if narrow else 34) - 4),
    )
    return table


def _queue(stage: Stage, priorities: list[int], lines: int, cells: int) -> Panel:
    rows = []
    for priority in priorities:
        waiting = [s for s in stage.streams.values() if s.part.priority == priority and s.state == "queued"]
        row = Text(f"p{priority} ", style="figure" if priority >= 8 else "mute")
        for stream in waiting[: cells - 7]:
            row.append("▪", style=TENANT_COLOURS.get(stream.part.tenant, "mute"))
        row.append(f" {len(waiting)}" if waiting else "·", style="mute")
        rows.append(row)
    rows += [Text("")] * (lines - len(rows))
    return Panel(
        Text("\n").join(rows),
        title=Text(" waiting ", "title"),
        title_align="left",
        border_style="frame",
        padding=(0, 1),
    )


def _workers(stage: Stage, lines: int, width: int) -> Panel:
    rows = [_worker(performer, width) for performer in stage.performers.values()]
    rows += [Text("")] * (lines - len(rows))
    total = Text.assemble((f"{stage.rates[-1]:,.0f}", "figure"), (" tokens/s ", "label"))
    return Panel(
        Text("\n").join(rows), title=Text(" workers ", "title"), title_align="left", subtitle=total,
        subtitle_align="right", border_style="frame", padding=(0, 1),
    )  # fmt: skip


def _worker(performer: Performer, width: int) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    if performer.killed_s is not None:
        line.append("✗ ", style="bad")
        line.append(f"{performer.name:<9}", style=f"{performer.colour} strike")
        line.append(f" kill -9 at {performer.killed_s:.1f} s, holding {performer.held_at_kill} streams", style="bad")
        return line
    if not performer.alive:
        line.append("◌ ", style="mute")
        line.append(f"{performer.name:<9}", style=performer.colour)
        line.append(" loading the model", style="mute")
        return line
    line.append("● ", style=performer.colour)
    line.append(f"{performer.name:<9}", style=f"bold {performer.colour}")
    line.append(f" pid {performer.pid:<7}", style="mute")
    cells = 12 if width >= 70 else 6
    line.append_text(bar(performer.holding / max(1, performer.seats), cells, performer.colour))
    line.append(f" {performer.holding:>2}/{performer.seats}", style="figure")
    line.append(f" {performer.rates[-1]:>6,.0f} tok/s ", style="mute")
    line.append(sparkline(list(performer.rates), max(0, min(24, width - line.cell_len))), style=performer.colour)
    return line


def _story(stage: Stage, width: int, lines: int) -> RenderableType:
    rows = [moment_line(moment.at_s, moment.kind, moment.text) for moment in stage.moments[-lines:]]
    for row in rows:
        row.truncate(width - 1, overflow="ellipsis")
    rows += [Text("")] * (lines - len(rows))
    return Align.left(Text("\n").join(rows))


def moment_line(at_s: float, kind: str, text: str) -> Text:
    """One line of the story."""
    style = _MOMENT_STYLES[kind]
    return Text.assemble(
        (f" {at_s:>5.1f} s ", "mute"), (f"{_MOMENT_MARKS[kind]} ", style), (text, style if kind != "plain" else "")
    )


def seconds(value: float | None) -> str:
    """A duration for the closing table."""
    return duration(value)
