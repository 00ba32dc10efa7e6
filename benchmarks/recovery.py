"""What is lost when everything fails: `python -m benchmarks.recovery [--json] [--quick] [--seed N]`.

Real worker processes, a real Redis with an append-only file (synced before every reply), a TCP proxy between them. At
random: workers are killed, frozen and thawed, Redis is killed and restarted, connections are dropped, delayed, or lose
a reply, jobs are cancelled. Every job is followed as a subscriber would; then every log is audited, and every output
compared with that of an undisturbed run of the same seeded requests. Exits with 1 unless all five counts are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from rich.progress import Progress, TaskID

from benchmarks.disturbance import BrokerProcess, Crew, Disturber, Interruption, Proxy
from benchmarks.report import console, parser, publish, table
from penstock import AsyncClient, AsyncJobHandle, BrokerUnavailable, JobCancelled, JobFailed, JobResult, JobState
from penstock_core.protocol.codec import decode_event
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import read_events, run, snapshot

ENDED = frozenset(state for state in JobState if state.is_terminal)
COUNTS = ("lost", "duplicate_terminals", "duplicate_tokens", "missing_tokens", "wrong_output")
PATIENCE_S = 600.0
_PROMPTS = (
    "Once upon a time there was a miller",
    "Long ago, by the sea, lived an old fisherman and his wife",
    "The fox said to the crow:",
    "A king had three daughters, and the youngest",
)
_SHARE_CANCELLED = 0.06


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=2000)
    options.add_argument("--workers", type=int, default=4, help="worker processes")
    options.add_argument("--minutes", type=float, default=3.0, help="how long things go wrong; jobs arrive meanwhile")
    options.add_argument("--seed", type=int, default=None, help="of the requests and of what goes wrong; printed")
    options.add_argument("--lease-s", type=float, default=15.0, help="the workers' --lease-s")
    options.add_argument(
        "--longest", type=int, default=256, help="tokens of the longest answers; more than the machine can make queue"
    )
    options.add_argument("--every-s", type=float, default=2.0, help="mean time between two disturbances")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.jobs, arguments.workers, arguments.minutes = 60, 2, 0.25
        arguments.lease_s, arguments.every_s, arguments.longest = 3.0, 1.0, 600
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    console.print(f"seed {arguments.seed}")
    figures = measure(arguments)
    table("recovery", ["", "value"], rows(figures))
    publish("recovery", figures, as_json=arguments.json)
    if any(figures[name] for name in COUNTS):
        sys.exit(1)


def rows(figures: dict[str, Any]) -> list[list[object]]:
    """The figures as a table; counts by kind on one line each."""
    return [
        [name, ", ".join(f"{count} {kind}" for kind, count in value.items()) if isinstance(value, dict) else value]
        for name, value in figures.items()
    ]


def requests(seed: int, jobs: int, longest: int) -> list[dict[str, Any]]:
    """Seeded jobs of every kind that a resumption must rebuild."""
    rng = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.95},
        {"temperature": 0.8, "top_k": 40, "n": 2},
        {"temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
        {"temperature": 0.7, "logprobs": 2},
        {"temperature": 1.1, "stop": [" the king", " and then"]},
        {"temperature": 0.9, "min_p": 0.02, "response_format": {"regex": "([a-z]{3,7} ){12,40}"}},
    ]
    return [
        {
            "prompt": rng.choice(_PROMPTS),
            "seed": rng.getrandbits(32),
            "max_tokens": max(1, longest // rng.choice((1, 2, 4, 8, 16))),
            "priority": rng.choice((2, 5, 5, 5, 8)),
            "tenant": rng.choice(("mill", "harbour")),
            "ignore_eos": "response_format" not in kind,
            **kind,
        }
        for kind in rng.choices(kinds, k=jobs)
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs and the audit."""
    wanted = requests(arguments.seed, arguments.jobs, arguments.longest)
    with tempfile.TemporaryDirectory(prefix="penstock-recovery-") as name, Progress(console=console) as progress:
        folder = Path(name)
        broker = BrokerProcess(folder)
        broker.start()
        try:
            calm = asyncio.run(_calm_run(arguments, broker, folder, wanted, progress))
            return _stormy_run(arguments, broker, folder, wanted, calm, progress)
        finally:
            broker.kill()


@contextlib.contextmanager
def _crew(arguments: argparse.Namespace, url: str, admin_port: int, queue: str, folder: Path) -> Iterator[Crew]:
    # Innocent jobs must survive more crashes here than in real life. Deterministic: an undisturbed run has other
    # batches, and without it two candidates within float32's last bits of each other could change places.
    options = ["--threads", "1", "--deterministic", "--max-crashes", "1000", "--lease-s", str(arguments.lease_s)]
    crew = Crew(arguments.workers, url, queue, folder, options)
    try:
        with redis.Redis(port=admin_port) as admin:
            crew.wait_until_ready(admin, queue)
        yield crew
    finally:
        crew.end()


async def _calm_run(
    arguments: argparse.Namespace, broker: BrokerProcess, folder: Path, wanted: list[dict[str, Any]], progress: Progress
) -> list[JobResult]:
    """What the requests give when nothing happens."""
    task = progress.add_task("undisturbed", total=len(wanted))
    with _crew(arguments, broker.url, broker.port, "calm", folder):
        async with AsyncClient(broker.url, queue="calm") as client:
            results = []
            for handle in await client.submit_many(wanted):
                if not isinstance(handle, AsyncJobHandle):
                    raise handle
                results.append(await handle.result(timeout=PATIENCE_S))
                progress.advance(task)
    return results


@dataclass
class Followed:
    """One job, as its subscriber saw it."""

    number: int
    job_id: str = ""
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    first_logged: dict[int, float] = field(default_factory=dict)  # attempt -> when Redis took its first chunk
    doubled: int = 0
    missing: int = 0
    error: str | None = None

    def take(self, chunk: TokenChunk) -> None:
        """Note a chunk as it comes."""
        seen = self.tokens[chunk.index]
        self.doubled += max(0, len(seen) - chunk.offset)
        self.missing += max(0, chunk.offset - len(seen))
        seen.extend(chunk.token_ids)
        self.text[chunk.index] += chunk.text


async def _follow(
    client: AsyncClient, followed: Followed, request: dict[str, Any], start_s: float, cancel_s: float | None
) -> None:
    await asyncio.sleep(start_s)
    key = f"job-{followed.number}"  # a submission whose reply was lost is sent again, and is the same job
    while True:
        try:
            job = await client.submit(**request, idempotency_key=key)
            break
        except BrokerUnavailable:
            await asyncio.sleep(0.1)
    followed.job_id = job.id
    canceller = asyncio.create_task(_cancel(job, cancel_s)) if cancel_s is not None else None
    try:
        async for chunk in job.stream():
            followed.take(chunk)
    except (JobCancelled, JobFailed):
        pass  # the audit looks at how it ended
    except Exception as error:
        followed.error = f"{type(error).__name__}: {error}"
    finally:
        if canceller is not None:
            canceller.cancel()


async def _cancel(job: AsyncJobHandle, after_s: float) -> None:
    await asyncio.sleep(after_s)
    while True:
        try:
            await job.cancel()
            return
        except BrokerUnavailable:
            await asyncio.sleep(0.1)


def _stormy_run(
    arguments: argparse.Namespace,
    broker: BrokerProcess,
    folder: Path,
    wanted: list[dict[str, Any]],
    calm: list[JobResult],
    progress: Progress,
) -> dict[str, Any]:
    proxy = Proxy(broker.port)
    jobs = [Followed(number) for number in range(len(wanted))]
    with _crew(arguments, proxy.url, broker.port, "storm", folder) as crew:
        disturber = Disturber(
            random.Random(arguments.seed + 1), broker, proxy, crew, "storm", arguments.lease_s, arguments.every_s
        )
        task = progress.add_task("disturbed", total=len(wanted))
        asyncio.run(_storm(arguments, proxy, disturber, wanted, jobs, progress, task))
    proxy.close()
    with redis.Redis(port=broker.port) as admin:
        figures = _audit(admin, jobs, calm)
        stats = run(admin, snapshot(QueueKeys("storm"))).stats
    takeovers = sorted(_takeovers(disturber.interruptions, jobs))
    return {
        **figures,
        "takeover_p50_s": _quantile(takeovers, 0.50),
        "takeover_p99_s": _quantile(takeovers, 0.99),
        "takeovers": len(takeovers),
        "reclaim_p50_s": _quantile(sorted(disturber.reclaims_s), 0.50),
        "reclaim_p99_s": _quantile(sorted(disturber.reclaims_s), 0.99),
        "fenced_writes": stats["fenced"],
        "reclaimed": stats["reclaimed"],
        "reader_errors": sum(job.error is not None for job in jobs),
        "unexpected_exits": crew.unexpected_exits,
        "disturbances": disturber.done,
        "seed": arguments.seed,
        "jobs": arguments.jobs,
        "workers": arguments.workers,
        "minutes": arguments.minutes,
        "lease_s": arguments.lease_s,
        "longest": arguments.longest,
    }


async def _storm(
    arguments: argparse.Namespace,
    proxy: Proxy,
    disturber: Disturber,
    wanted: list[dict[str, Any]],
    jobs: list[Followed],
    progress: Progress,
    task: TaskID,
) -> None:
    rng = random.Random(arguments.seed + 2)
    length_s = arguments.minutes * 60
    thread = threading.Thread(target=disturber.run, daemon=True)
    async with AsyncClient(proxy.url, queue="storm", patience_s=PATIENCE_S) as client:
        running = set()
        for followed, request in zip(jobs, wanted, strict=True):
            start_s = rng.uniform(0, length_s * 0.9)
            cancel_s = rng.uniform(0, 4) if rng.random() < _SHARE_CANCELLED else None
            follower = asyncio.create_task(_follow(client, followed, request, start_s, cancel_s))
            follower.add_done_callback(lambda _: progress.advance(task))
            running.add(follower)
        thread.start()
        await asyncio.sleep(length_s)
        disturber.stopped.set()
        await asyncio.to_thread(thread.join)
        _, unfinished = await asyncio.wait(running, timeout=PATIENCE_S)
        for follower in unfinished:
            follower.cancel()
        for followed in jobs:
            if followed.error is not None:
                console.print(f"a reader gave up on {followed.job_id}: {followed.error}")


def _audit(admin: redis.Redis, jobs: list[Followed], calm: list[JobResult]) -> dict[str, Any]:
    """Hold log, result, what the subscriber saw and the undisturbed result against one another."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    states: Counter[str] = Counter()
    keys = QueueKeys("storm")
    for followed in jobs:
        found: Any = admin.hmget(keys.job(followed.job_id), "state", "result", "finished")
        state = JobState(found[0].decode()) if found[0] else None
        states[state or "gone"] += 1
        if state is None or not state.is_terminal:
            counts["lost"] += 1
            console.print(f"lost: job {followed.job_id} is {state or 'gone'}")
            continue
        faults = Counter({"duplicate_tokens": followed.doubled, "missing_tokens": followed.missing})
        logged: dict[int, list[int]] = defaultdict(list)
        entries: Any = admin.xrange(keys.events(followed.job_id))
        page = run(admin, read_events(keys, followed.job_id, limit=1_000_000))
        *chunks, ended = [decode_event(data) for data in page.events] if page is not None else [None]
        faults["lost"] += not isinstance(ended, JobEnded)
        times = [int(entry_id.partition(b"-")[0]) for entry_id, _ in entries]
        times += [int(found[2])] * (len(chunks) - len(times))  # the last ones came with the end
        for at_ms, chunk in zip(times, chunks, strict=True):
            faults["duplicate_terminals"] += isinstance(chunk, JobEnded)
            if isinstance(chunk, TokenChunk):
                followed.first_logged.setdefault(chunk.attempt, at_ms / 1000)
                faults["duplicate_tokens"] += max(0, len(logged[chunk.index]) - chunk.offset)
                faults["missing_tokens"] += max(0, chunk.offset - len(logged[chunk.index]))
                logged[chunk.index].extend(chunk.token_ids)
        for index, tokens in logged.items():
            faults["missing_tokens"] += max(0, len(tokens) - len(followed.tokens[index]))
            faults["duplicate_tokens"] += max(0, len(followed.tokens[index]) - len(tokens))
        assert isinstance(ended, JobEnded)
        faults["wrong_output"] += not _is_right(state, ended, logged, followed, calm[followed.number])
        if faults.total():
            console.print(f"job {followed.job_id} (request {followed.number}, {state}): {dict(+faults)}")
        counts += faults
    ends = sum(count for name, count in run(admin, snapshot(keys)).stats.items() if name in ENDED)
    counts["duplicate_terminals"] += max(0, ends - sum(jobs for state, jobs in states.items() if state in ENDED))
    return {**{name: counts[name] for name in COUNTS}, "states": dict(states)}


def _is_right(
    state: JobState, ended: JobEnded, logged: dict[int, list[int]], followed: Followed, calm: JobResult
) -> bool:
    """Whether a completed job gave what it gives undisturbed, to its subscriber too; a cancelled one its beginning."""
    choices = {choice.index: choice for choice in calm.choices}
    if state is JobState.CANCELLED:
        return all(tokens == list(choices[index].token_ids[: len(tokens)]) for index, tokens in logged.items())
    if state is not JobState.COMPLETED or ended.result is None:
        return False
    return len(ended.result.choices) == len(choices) and all(
        (choice.token_ids, choice.text, choice.finish_reason)
        == (choices[choice.index].token_ids, choices[choice.index].text, choices[choice.index].finish_reason)
        and followed.tokens[choice.index] == list(choice.token_ids)
        and followed.text[choice.index] == choice.text
        for choice in ended.result.choices
    )


def _takeovers(interruptions: list[Interruption], jobs: list[Followed]) -> Iterator[float]:
    """Seconds from the kill of a job's worker to the first chunk of a later attempt in its log, where there was one."""
    by_id = {followed.job_id: followed for followed in jobs}
    for interruption in interruptions:
        followed = by_id.get(interruption.job_id)
        later = [
            at for attempt, at in (followed.first_logged if followed else {}).items() if attempt > interruption.attempt
        ]
        if later:
            yield min(later) - interruption.at


def _quantile(values: list[float], share: float) -> float | None:
    return round(values[min(len(values) - 1, int(len(values) * share))], 3) if values else None


if __name__ == "__main__":
    main()
