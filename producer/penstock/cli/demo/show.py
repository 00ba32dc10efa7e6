"""Puts a run of the demo on a screen: a live dashboard on a terminal, plain lines of progress anywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from penstock.cli.demo.dashboard import moment_line, picture
from penstock.cli.demo.director import Director, Report
from penstock.cli.demo.report import table
from penstock.cli.demo.stage import Moment, Stage
from penstock.cli.screen import THEME
from penstock.embedded import EmbeddedBroker

_FRAMES_PER_S = 8
_PROGRESS_S = 2.0
_MAX_WIDTH, _MAX_HEIGHT = 120, 38
_RECORD_WIDTH, _RECORD_HEIGHT = 108, 36


def perform(screen: Console, *, live: bool, record: Path | None) -> Report:
    """Run the demo on `screen`; with `record` also save its picture as SVG.

    Raises:
        CommandFailed: it could not be played to its end.
        BrokerUnavailable: no Redis server on this machine.
    """
    stage = Stage()
    keeper = _Keeper(stage) if record is not None else None
    show: Callable[[Moment], None] = _silent if live else lambda moment: _print_moment(screen, moment)
    with EmbeddedBroker() as broker:
        version = ".".join(map(str, broker.binary.version)) if broker.binary is not None else "?"
        stage.broker = f"{broker.binary.flavour if broker.binary else 'redis'} {version}, append-only file on"
        stage.model = "penstock-story on 2 worker processes"
        show(stage.tell("plain", f"private {stage.broker} at {broker.url.rpartition('@')[2]}"))
        director = Director(stage, show)
        try:
            report = asyncio.run(_play(screen, stage, director, broker, live, keeper))
        finally:
            director.close()
    if record is not None and keeper is not None:
        keeper.save(record, report)
    return report


async def _play(
    screen: Console, stage: Stage, director: Director, broker: EmbeddedBroker, live: bool, keeper: _Keeper | None
) -> Report:
    painter = _dashboard(screen, stage) if live else _progress(screen, stage)
    watching = asyncio.create_task(keeper.watch()) if keeper is not None else None
    try:
        async with painter:
            return await director.run(broker)
    finally:
        if watching is not None:
            watching.cancel()


@asynccontextmanager
async def _dashboard(screen: Console, stage: Stage) -> AsyncIterator[None]:
    def frame() -> RenderableType:
        return picture(stage, min(screen.width, _MAX_WIDTH), min(screen.height - 1, _MAX_HEIGHT))

    with Live(console=screen, auto_refresh=False, transient=False) as live:

        async def paint() -> None:
            while True:
                live.update(frame(), refresh=True)
                await asyncio.sleep(1 / _FRAMES_PER_S)

        painting = asyncio.create_task(paint())
        try:
            yield
        finally:
            painting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await painting
            live.update(frame(), refresh=True)


@asynccontextmanager
async def _progress(screen: Console, stage: Stage) -> AsyncIterator[None]:
    async def report() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            if stage.phase == "playing":
                words = (
                    f"{stage.count('running')} running, {stage.count('queued')} waiting, "
                    f"{stage.count('completed')} done, {stage.tokens:,} tokens, {stage.rates[-1]:,.0f} tokens/s"
                )
                _print_moment(screen, Moment(stage.now(), "plain", words))

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        reporting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporting


def _silent(moment: Moment) -> None:
    """The dashboard shows the story itself."""


def _print_moment(screen: Console, moment: Moment) -> None:
    screen.print(moment_line(moment.at_s, moment.kind, moment.text), soft_wrap=True)


class _Keeper:
    """Keeps the picture of the moment shortly after the takeover, for the README."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._kept: RenderableType | None = None

    async def watch(self) -> None:
        """Wait for that moment."""
        while True:
            await asyncio.sleep(0.05)
            resumed = [s for s in self._stage.streams.values() if s.resumed_s is not None and not s.is_over]
            words = sum(stream.segments[-1].tokens >= 12 for stream in resumed)
            if resumed and (words >= len(resumed) * 0.7 or self._stage.phase != "playing"):
                self._kept = picture(self._stage, _RECORD_WIDTH, _RECORD_HEIGHT)
                return

    def save(self, path: Path, report: Report) -> None:
        """Write the SVG."""
        console = Console(
            file=io.StringIO(), record=True, width=_RECORD_WIDTH, theme=THEME, force_terminal=True,
            color_system="truecolor", highlight=False,
        )  # fmt: skip
        if self._kept is not None:
            console.print(self._kept)
        console.print(table(report))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_self_contained(console.export_svg(title="penstock demo")), encoding="utf-8")


def _self_contained(svg: str) -> str:
    """The picture without references to fonts elsewhere."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")
