"""Runs the demo: raises the broker and two workers, submits the jobs, kills one worker, waits for the end, proves it.

Knows nothing of drawing: it writes the `Stage`, and calls `on_moment` for each line of the story.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock import AsyncClient, AsyncJobHandle
from penstock.cli.demo.proof import Audit, Evidence, Verdict, judge, read_log
from penstock.cli.demo.stage import Moment, Performer, Stage, Stream
from penstock.cli.demo.workload import Part, more, opening, urgent
from penstock.cli.exits import CommandFailed, ExitCode
from penstock.cli.processes import WorkerProcess
from penstock.cli.screen import WORKER_COLOURS
from penstock.cli.session import Queue, open_queue
from penstock_core.protocol.errors import JobError, PenstockError, QueueFull
from penstock_core.protocol.jobs import JobResult
from penstock_core.protocol.transitions import QueueSnapshot, read_jobs, snapshot

if TYPE_CHECKING:
    from penstock.embedded import EmbeddedBroker

MODEL = "penstock-story"
WORKERS = ("worker-a", "worker-b")
SEATS = 16
_POLL_S = 0.15
_URGENT_EVERY_S = 0.9
_ENCORE_S = 2.5
_READY_TIMEOUT_S = 90.0
_RUN_TIMEOUT_S = 240.0
# The worker is killed while it visibly holds work: streams that have said something and have a good deal left to say.
_KILL_STREAMS, _KILL_SAID, _KILL_LEFT = 4, 40, 40
# Not before the other one may judge who is gone: a worker trusts its view of the connections after 5 s. Until then a
# fast machine is given more to do.
_KILL_AFTER_S = 5.5
_UNDER_WAY = SEATS - 2
_MOST_JOBS = 400


@dataclass(slots=True)
class Report:
    """The figures of a run."""

    verdict: Verdict
    duration_s: float
    tokens: int
    tokens_per_s: float
    ttft_p50_ms: float
    prefix_hit_rate: float
    interrupted: int
    takeover_s: float | None
    takeover_all_s: float | None
    killed: str
    killed_at_s: float
    redis_version: str
    model: str
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the demo shows what it claims: a takeover happened, and the proof holds."""
        return self.verdict.holds and self.interrupted > 0 and self.takeover_s is not None


class Director:
    """One run of the demo."""

    def __init__(self, stage: Stage, on_moment: Callable[[Moment], None]) -> None:
        self._stage = stage
        self._on_moment = on_moment
        self._processes: dict[str, WorkerProcess] = {}
        self._audits: dict[str, Audit] = {}
        self._results: dict[str, JobResult] = {}
        self._followers: set[asyncio.Task[None]] = set()
        self._interrupted: list[Stream] = []
        self._victim: Performer | None = None
        self._started_s = 0.0
        self._resumed_s: float | None = None

    async def run(self, broker: EmbeddedBroker) -> Report:
        """Play the whole piece on a started broker.

        Raises:
            CommandFailed: a worker did not start, or the jobs did not end in time.
        """
        with open_queue(broker.url, MODEL) as queue:
            async with AsyncClient(broker.url, queue=MODEL) as client:
                try:
                    return await self._play(broker, queue, client)
                finally:
                    for task in self._followers:
                        task.cancel()
                    await asyncio.gather(*self._followers, return_exceptions=True)

    def close(self) -> None:
        """End the workers that still run."""
        for process in self._processes.values():
            process.close(grace_s=5.0)

    async def _play(self, broker: EmbeddedBroker, queue: Queue, client: AsyncClient) -> Report:
        stage = self._stage
        self._start_workers(broker.url)
        first = opening()
        await self._submit(client, first)
        self._tell("plain", f"{len(first)} jobs accepted; no worker is up yet, so they wait in Redis")
        self._followers.add(asyncio.create_task(self._poll(queue)))
        await self._until(self._all_ready, _READY_TIMEOUT_S, "the workers did not come up")
        started_s = self._started_s = stage.now()
        stage.phase = "playing"
        self._tell("plain", f"both workers are up, with room for {SEATS} streams each")
        feeding = asyncio.create_task(self._feed(client, started_s))
        self._followers.add(feeding)
        await self._until(self._has_victim, _RUN_TIMEOUT_S, "no worker ever held enough streams to be killed")
        self._kill()
        await self._until(self._all_resumed, _RUN_TIMEOUT_S, "the interrupted streams were not taken over")
        self._resumed_s = stage.now()
        self._tell_takeover()
        await feeding
        await self._until(self._all_over, _RUN_TIMEOUT_S, "the jobs did not all end")
        played_s = stage.now() - started_s
        stage.phase = "proving"
        jobs, done = len(stage.streams), stage.count("completed")
        self._tell("good", f"{done} of {jobs} jobs completed in {played_s:.1f} s; now the proof")
        evidence = await self._gather_evidence(queue, client)
        stage.phase = "done"
        return self._report(broker, judge(list(evidence.values())), played_s)

    # -- acting

    def _start_workers(self, url: str) -> None:
        for name, colour in zip(WORKERS, WORKER_COLOURS, strict=False):
            flags = [
                f"--model={MODEL}", f"--queue={MODEL}", f"--worker-id={name}", f"--max-num-sequences={SEATS}",
                "--device=cpu", "--threads=1", "--heartbeat-s=0.25", "--reclaim-tick-s=0.1", "--log-level=warning",
            ]  # fmt: skip
            process = WorkerProcess(url, flags)
            self._processes[name] = process
            self._stage.performers[name] = Performer(name, colour, pid=process.pid, seats=SEATS)

    async def _submit(self, client: AsyncClient, parts: Sequence[Part]) -> None:
        handles = await client.submit_many([_item(part) for part in parts])
        for part, handle in zip(parts, handles, strict=True):
            if isinstance(handle, QueueFull):
                raise handle
            job_id = handle.id
            self._stage.streams[job_id] = Stream(job_id, part, submitted_s=self._stage.now())
            self._audits[job_id] = Audit()
            task = asyncio.create_task(self._follow(handle))
            self._followers.add(task)

    async def _feed(self, client: AsyncClient, started_s: float) -> None:
        """Submit what comes during the run, until a little after the takeover: urgent questions at a steady pace, and
        enough stories to keep the workers in the middle of some, however fast the machine is."""
        stage = self._stage
        asked = 0
        while self._resumed_s is None or stage.now() - self._resumed_s < _ENCORE_S:
            await asyncio.sleep(0.05)
            if stage.now() - started_s >= asked * _URGENT_EVERY_S:
                await self._submit(client, [urgent(len(stage.streams), asked)])
                asked += 1
            under_way = stage.count("queued", "delayed", "running")
            if under_way < _UNDER_WAY and len(stage.streams) < _MOST_JOBS:
                await self._submit(client, [more(len(stage.streams))])

    async def _follow(self, handle: AsyncJobHandle) -> None:
        """Subscribe to one job, as any application would."""
        stage, job_id = self._stage, handle.id
        stream = stage.streams[job_id]
        try:
            async for chunk in handle.stream():
                self._audits[job_id].take(chunk)
                stage.receive(job_id, chunk.attempt, len(chunk.token_ids), chunk.text)
            self._results[job_id] = await handle.result()
            stream.state = "completed"
        except JobError as error:
            stream.state = "failed"
            self._tell("bad", f"{stream.part.title}: {error}")
        except PenstockError as error:
            stream.state = "failed"
            self._tell("bad", f"{stream.part.title}: {type(error).__name__}: {error}")
        finally:
            stream.ended_s = stage.now()

    def _kill(self) -> None:
        stage, victim = self._stage, self._victim
        assert victim is not None
        self._interrupted = [stream for stream in self._held_by(victim) if stream.tokens]
        for stream in self._interrupted:
            stream.held_at_kill = True
            stream.tokens_at_kill = stream.tokens
        victim.killed_s = stage.now()
        victim.held_at_kill = len(self._interrupted)
        victim.alive = False
        self._processes[victim.name].kill()
        stage.spotlight = max(self._interrupted, key=lambda stream: min(stream.tokens, _left(stream))).job_id
        self._tell("kill", f"kill -9 {victim.name} (pid {victim.pid}) in the middle of {victim.held_at_kill} streams")

    # -- watching

    async def _poll(self, queue: Queue) -> None:
        """Learn from the queue which workers live, and who runs what."""
        stage = self._stage
        while True:
            seen, owners = await asyncio.to_thread(self._look, queue)
            for view in seen.workers:
                performer = stage.performers.get(view.worker_id)
                if performer is None or view.record is None or performer.killed_s is not None:
                    continue
                performer.alive = True
                performer.seats = view.record.max_sequences or performer.seats
            for job_id, (attempt, owner, state) in owners.items():
                stage.attribute(job_id, attempt, owner)
                stream = stage.streams[job_id]
                if not stream.is_over and state in ("queued", "delayed", "running"):
                    stream.state = state
            for performer in stage.performers.values():
                performer.holding = len(self._held_by(performer)) if performer.killed_s is None else 0
            shown = stage.streams.get(stage.spotlight or "")
            if self._victim is None and (shown is None or shown.is_over):
                talking = [stream for stream in stage.streams.values() if stream.tokens and not stream.is_over]
                stage.spotlight = min(talking, key=lambda s: s.tokens).job_id if talking else stage.spotlight
            stage.sample_rates()
            await asyncio.sleep(_POLL_S)

    def _look(self, queue: Queue) -> tuple[QueueSnapshot, dict[str, tuple[int, str, str]]]:
        open_jobs = [stream.job_id for stream in list(self._stage.streams.values()) if not stream.is_over]
        seen = queue.run(snapshot(queue.keys))
        statuses = queue.run(read_jobs(queue.keys, open_jobs)) if open_jobs else []
        owners = {s.job_id: (s.attempt, s.owner, str(s.state)) for s in statuses if s is not None}
        return seen, owners

    def _held_by(self, performer: Performer) -> list[Stream]:
        return [
            stream
            for stream in self._stage.streams.values()
            if not stream.is_over and stream.segments and stream.segments[-1].worker == performer.name
        ]

    async def _until(self, condition: Callable[[], bool], timeout_s: float, problem: str) -> None:
        deadline = self._stage.now() + timeout_s
        while not condition():
            for name, process in self._processes.items():
                performer = self._stage.performers[name]
                if performer.killed_s is None and (code := process.exit_code) is not None:
                    words = process.last_words()
                    raise CommandFailed(ExitCode.ERROR, name, f"ended with status {code}: {words or 'it said nothing'}")
            if self._stage.phase == "playing" and self._victim is None and self._all_over():
                raise CommandFailed(ExitCode.ERROR, "demo", "every job ended before a worker could be killed")
            if self._stage.now() > deadline:
                raise CommandFailed(ExitCode.ERROR, "demo", f"{problem} within {timeout_s:.0f} s")
            await asyncio.sleep(0.02)

    def _all_ready(self) -> bool:
        return all(performer.alive for performer in self._stage.performers.values())

    def _has_victim(self) -> bool:
        """Choose the worker to kill: one in the middle of several streams, while the other has room to take them."""
        stage = self._stage
        if stage.now() - self._started_s < _KILL_AFTER_S:
            return False
        best: tuple[int, Performer] | None = None
        for performer in stage.performers.values():
            ripe = [s for s in self._held_by(performer) if s.tokens >= _KILL_SAID and _left(s) >= _KILL_LEFT]
            if len(ripe) >= _KILL_STREAMS and (best is None or len(ripe) > best[0]):
                best = (len(ripe), performer)
        if best is None:
            return False
        others = sum(len(self._held_by(p)) for p in stage.performers.values() if p is not best[1])
        has_room = others + len(self._held_by(best[1])) <= SEATS and not stage.count("queued")
        if has_room:
            self._victim = best[1]
        return has_room

    def _all_resumed(self) -> bool:
        return all(stream.resumed_s is not None or stream.is_over for stream in self._interrupted)

    def _all_over(self) -> bool:
        return all(stream.is_over for stream in self._stage.streams.values())

    # -- telling

    def _tell(self, kind: str, text: str) -> None:
        self._on_moment(self._stage.tell(kind, text))

    def _pauses(self) -> list[float]:
        assert self._victim is not None
        assert self._victim.killed_s is not None
        killed_s = self._victim.killed_s
        return sorted(s.resumed_s - killed_s for s in self._interrupted if s.resumed_s is not None)

    def _tell_takeover(self) -> None:
        pauses = self._pauses()
        heir = next((p.name for p in self._stage.performers.values() if p.killed_s is None), "the other")
        if pauses:
            first, last = f"{pauses[0]:.2f}", f"{pauses[-1]:.2f}"
            after = first if first == last else f"{first} to {last}"
            self._tell("takeover", f"{heir} goes on with {len(pauses)} streams at their next tokens, after {after} s")

    # -- proving

    async def _gather_evidence(self, queue: Queue, client: AsyncClient) -> dict[str, Evidence]:
        stage = self._stage
        evidence: dict[str, Evidence] = {}
        for job_id, stream in stage.streams.items():
            received = self._audits[job_id]
            job = Evidence(job_id, stream.part.title, received, self._results.get(job_id))
            logged, _ = await asyncio.to_thread(read_log, queue, job_id)
            job.logged = logged
            job.must_compare = len(received.attempts | logged.attempts) > 1
            evidence[job_id] = job
        self._tell("plain", f"re-read {len(evidence)} token logs from Redis")
        again = [stage.streams[job_id] for job_id, job in evidence.items() if job.must_compare]
        if again:
            handles = await client.submit_many([_item(stream.part) for stream in again])
            for stream, handle in zip(again, handles, strict=True):
                if isinstance(handle, QueueFull):
                    continue
                with contextlib.suppress(PenstockError):
                    evidence[stream.job_id].undisturbed = await handle.result(timeout=60.0)
            self._tell("plain", f"ran the {len(again)} interrupted requests once more, undisturbed, to compare them")
        return evidence

    def _report(self, broker: EmbeddedBroker, verdict: Verdict, played_s: float) -> Report:
        stage, victim = self._stage, self._victim
        assert victim is not None
        results = list(self._results.values())
        prompt = sum(result.usage.prompt_tokens for result in results)
        cached = sum(result.usage.cached_tokens for result in results)
        # A job accepted before any worker was up is timed from the moment that both were.
        first = [
            s.first_token_s - max(s.submitted_s, self._started_s)
            for s in stage.streams.values()
            if s.first_token_s is not None
        ]
        pauses = self._pauses()
        tokens = sum(stream.tokens for stream in stage.streams.values())
        version = ".".join(map(str, broker.binary.version)) if broker.binary is not None else "?"
        resumed = [stream for stream in self._interrupted if stream.resumed_s is not None]
        return Report(
            verdict=verdict,
            duration_s=stage.now(),
            tokens=tokens,
            tokens_per_s=tokens / max(1e-6, played_s),
            ttft_p50_ms=statistics.median(first) * 1000 if first else 0.0,
            prefix_hit_rate=cached / prompt if prompt else 0.0,
            interrupted=len(resumed),
            takeover_s=pauses[0] if pauses else None,
            takeover_all_s=pauses[-1] if pauses else None,
            killed=victim.name,
            killed_at_s=victim.killed_s or 0.0,
            redis_version=version,
            model=MODEL,
            faults=list(verdict.faults),
        )


def _left(stream: Stream) -> int:
    """Tokens a stream surely has still to come."""
    return int(stream.part.sampling.get("min_tokens", 0)) - stream.tokens


def _item(part: Part) -> dict[str, object]:
    return {
        "messages": list(part.messages),
        "priority": part.priority,
        "tenant": part.tenant,
        **part.sampling,
        **({"affinity": part.affinity} if part.affinity is not None else {}),
    }
