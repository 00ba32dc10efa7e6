"""The demo's dashboard fits every screen, and shows a takeover where it happened."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from penstock.cli.demo import dashboard
from penstock.cli.demo.stage import Performer, Stage
from penstock.cli.demo.stage import Stream as JobStream
from penstock.cli.demo.workload import more, opening, urgent
from penstock.cli.screen import THEME, WORKER_COLOURS

WORDS = ("Once", "upon", "a", "time", "there", "was", "a", "young", "fox", "called", "Zoë.\n\n", "\x1b[31m")


def stage_of(kind: str) -> Stage:
    stage = Stage(broker="redis 7.0.15", model="penstock-story")
    if kind == "empty":
        return stage
    for number, name in enumerate(("worker-a", "worker-b")):
        stage.performers[name] = Performer(
            name, WORKER_COLOURS[number], 4000 + number, alive=kind != "waiting", seats=16
        )
    for part in opening():
        stage.streams[f"{part.number:032x}"] = JobStream(f"{part.number:032x}", part)
    stage.tell("plain", "36 jobs accepted")
    if kind == "waiting":
        return stage
    rng = random.Random(1)
    for number, (job_id, stream) in enumerate(stage.streams.items()):
        if number % 5 == 4:
            continue
        for _ in range(rng.randint(3, 200)):
            stage.receive(job_id, 1, 1, f"{rng.choice(WORDS)} ")
        stage.attribute(job_id, 1, "worker-b" if number % 2 else "worker-a")
        if number % 7 == 0:
            stream.state, stream.ended_s = "completed", 1.0
    stage.spotlight = f"{1:032x}"
    if kind == "killed":
        victim = stage.performers["worker-b"]
        victim.killed_s, victim.held_at_kill, victim.alive = 3.2, 9, False
        for number, (job_id, stream) in enumerate(stage.streams.items()):
            if stream.tokens and not stream.is_over and number % 2:
                stream.held_at_kill = True
                for _ in range(20):
                    stage.receive(job_id, 2, 1, "after ")
                stage.attribute(job_id, 2, "worker-a")
        stage.tell("kill", "kill -9 worker-b")
    stage.sample_rates()
    return stage


def drawn(stage: Stage, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, theme=THEME, highlight=False, record=True)
    console.print(dashboard.picture(stage, width, height))
    return console.export_text().splitlines()


@pytest.mark.parametrize("kind", ["empty", "waiting", "playing", "killed"])
@pytest.mark.parametrize(("width", "height"), [(70, 22), (80, 24), (100, 30), (120, 38), (200, 38)])
def test_the_picture_fits(kind: str, width: int, height: int):
    lines = drawn(stage_of(kind), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_takeover_is_marked_in_text_bar_and_story():
    lines = drawn(stage_of("killed"), 120, 38)
    text = "\n".join(lines)
    assert "┃" in text
    assert dashboard.TAKEOVER_MARK in text
    assert "worker-b died, worker-a goes on at token" in " ".join(text.replace("│", " ").split())
    assert "kill -9 at 3.2 s, holding 9 streams" in text


def test_a_model_cannot_drive_the_terminal():
    assert "\x1b" not in "\n".join(drawn(stage_of("killed"), 120, 38))


def test_interrupted_streams_stay_on_view():
    stage = stage_of("killed")
    held = sum(stream.held_at_kill for stream in stage.streams.values())
    rows = [line for line in drawn(stage, 120, 60) if "┃" in line]
    assert len(rows) == held


def test_tokens_are_counted_for_the_worker_that_made_them():
    stage = stage_of("killed")
    by_worker = sum(performer.tokens for performer in stage.performers.values())
    assert by_worker == stage.tokens == sum(stream.tokens for stream in stage.streams.values())


def test_jobs_of_the_programme_differ_and_are_seeded():
    parts = [*opening(), more(90), urgent(91, 0), urgent(92, 9)]
    assert len({part.number for part in parts}) == len(parts)
    assert all("seed" in part.sampling for part in parts)
    assert {part.priority for part in parts} == {2, 5, 9}
    assert len({part.tenant for part in parts}) == 3
    # the shared system prompt is what the prefix cache is shown with
    assert len({part.messages[0]["content"] for part in parts}) == 1
