"""The client's logic against a world made of a list and a clock: every interleaving of loss gives the same stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import AuthenticationError, ResponseError

from penstock import flows
from penstock.cursor import TokenCursor
from penstock.effects import Command, Confirm, Effect, Emit, Flow, Pause, Run, RunToDisk
from penstock.feed import FeedTable, Inbox
from penstock.settings import ClientSettings
from penstock.tickets import Ticket, tickets_of, watching
from penstock_core.protocol.codec import encode_event
from penstock_core.protocol.errors import BrokerUnavailable, InvalidRequest, JobNotFound, QueueFull, ResultTimeout
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import Choice, FinishReason, JobResult, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.requests import JobOptions
from penstock_core.protocol.transitions import NewJob, SubmitOutcome

KEYS = QueueKeys("q")
SETTINGS = ClientSettings("redis://localhost", "q", patience_s=10, submit_patience_s=2, backstop_s=5)
STUBBORN = replace(SETTINGS, patience_s=1e6)
STATUS_FIELDS = 20


@dataclass
class World:
    """A broker with one job, whose log grows when told to; pushes reach the feed while the connection is up."""

    log: list[bytes] = field(default_factory=list)
    state: str = "running"
    now: float = 0.0
    connected: bool = True
    outages: int = 0  # calls still to fail
    calls: list[str] = field(default_factory=list)
    on_pause: Callable[[], None] = lambda: None
    table: FeedTable = field(default_factory=FeedTable)
    settings: ClientSettings = SETTINGS

    @property
    def around(self) -> flows.Surroundings:
        return flows.Surroundings(self.settings, lambda: self.now)

    def append(self, event: TokenChunk | JobEnded) -> None:
        data = encode_event(event)
        self.log.append(data)
        if isinstance(event, JobEnded):
            self.state = str(event.state)
        if self.connected:
            self.table.deliver("job", data)

    def reconnect(self) -> None:
        self.connected = True
        self.table.mark_own_lost()

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Pause(inbox, seconds):
                if inbox is None or inbox.is_quiet:
                    self.on_pause()
                    self.now += seconds
                return None
            case Confirm():
                return None
            case Run(calls):
                if self.outages:
                    self.outages -= 1
                    raise BrokerUnavailable("down")
                return [call.parse(self.reply(call.script.name, list(call.args))) for call in calls]
        raise AssertionError(effect)

    def reply(self, script: str, args: list[Any]) -> Any:
        self.calls.append(script)
        match script:
            case "read_events":
                after, limit = int(args[2] or 0), args[3]
                events = [
                    item for i, data in enumerate(self.log[after : after + limit]) for item in (after + i + 1, data)
                ]
                return [self.state, [str(item).encode() if isinstance(item, int) else item for item in events]]
            case "read_end":
                return [[self.state, self.log[-1] if self.state != "running" else b""]]
            case "read_job":
                return [[self.state.encode(), *[b""] * (STATUS_FIELDS - 1)]]
            case "reclaim":
                self.append(JobEnded(JobState.EXPIRED, 0))
                return [[], [], [b"job"], 0, [], []]
        raise AssertionError(script)

    def drive(self, flow: Flow[Any]) -> tuple[list[TokenChunk], Any]:
        """Perform a flow; returns what it emitted and what it returned."""
        emitted: list[TokenChunk] = []
        answer: Any = None
        step: Any = flow.send
        while True:
            try:
                effect = step(answer)
            except StopIteration as stop:
                return emitted, stop.value
            if isinstance(effect, Emit):
                emitted.append(effect.chunk)
                answer, step = None, flow.send
                continue
            try:
                answer, step = self.perform(effect), flow.send
            except Exception as error:
                answer, step = error, flow.throw

    def watch(self, *, chunks: bool = True, push: bool = True, deadline_at: float | None = None) -> flows.Watch:
        if not push:
            return flows.Watch(KEYS, "job", None, None, deadline_at, True)
        (feed,) = self.table.add_own(["job"])
        inbox = Inbox(lambda: None, chunks=chunks)
        self.table.open(feed, inbox)
        return flows.Watch(KEYS, "job", feed, inbox, deadline_at, True)


def chunk(offset: int, count: int, reason: FinishReason | None = None) -> TokenChunk:
    ids = tuple(range(offset, offset + count))
    return TokenChunk(1, 0, offset, ids, tuple(f"<{i}>" for i in ids) or ("",), reason)


def released(offset: int, text: str) -> TokenChunk:
    """Held-back text that comes without a token."""
    return TokenChunk(1, 0, offset, (), (text,))


def completed(count: int) -> JobEnded:
    return JobEnded(
        JobState.COMPLETED, 1, JobResult((Choice(0, "", tuple(range(count)), FinishReason.LENGTH),), worker="w")
    )


class Acts:
    """What happens at the first, the second, ... pause."""

    def __init__(self, world: World, *acts: list[TokenChunk | JobEnded]) -> None:
        self._world = world
        self._acts = iter(acts)

    def __call__(self) -> None:
        for event in next(self._acts):
            self._world.append(event)


HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("tokens"), st.integers(1, 5)),
        st.tuples(st.just("text"), st.just(0)),
        st.tuples(st.just("disconnect"), st.just(0)),
        st.tuples(st.just("reconnect"), st.just(0)),
        st.tuples(st.just("outage"), st.integers(1, 3)),
        st.tuples(st.just("rest"), st.just(0)),
    ),
    max_size=40,
)


@given(
    happenings=HAPPENINGS, inbox_bytes=st.sampled_from([0, 40, 200, 10**6]), push=st.booleans(), start=st.integers(0, 9)
)
def test_every_token_and_every_text_comes_once_whatever_is_lost_on_the_way(
    happenings: list[tuple[str, int]], inbox_bytes: int, push: bool, start: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.feed.INBOX_BYTES", inbox_bytes)
        patch.setattr("penstock.flows.PAGE_EVENTS", 3)
        world = World(settings=STUBBORN)
        watch = world.watch(push=push)
        todo = iter([*happenings, ("reconnect", 0), ("end", 0)])
        said = 0
        text = ""

        def happen() -> None:
            """The world moves while the reader waits: up to the next rest."""
            nonlocal said, text
            for what, count in todo:
                match what:
                    case "tokens":
                        world.append(chunk(said, count))
                        text += "".join(f"<{i}>" for i in range(max(said, start), said + count))
                        said += count
                    case "text":
                        world.append(released(said, f"[{len(world.log)}]"))
                        text += f"[{len(world.log) - 1}]" if said >= start else ""
                    case "disconnect":
                        world.connected = False
                    case "reconnect":
                        world.reconnect()
                    case "outage":
                        world.outages += count
                    case "end":
                        world.append(chunk(said, 0, FinishReason.LENGTH))
                        world.append(completed(said))
                        return
                    case "rest":
                        return

        world.on_pause = happen
        emitted, _ = world.drive(flows.stream(world.around, watch, TokenCursor(start), None))
        assert [token for part in emitted for token in part.token_ids] == list(range(start, said))
        assert "".join(part.text for part in emitted) == text
        assert [part.finish_reason for part in emitted if part.finish_reason] == (
            [FinishReason.LENGTH] if said >= start else []
        )


@given(happenings=HAPPENINGS, push=st.booleans())
def test_a_result_comes_whatever_is_lost_on_the_way(happenings: list[tuple[str, int]], push: bool) -> None:
    world = World(settings=STUBBORN)
    watch = world.watch(chunks=False, push=push)
    todo = iter([*happenings, ("end", 0)])

    def happen() -> None:
        for what, count in todo:
            match what:
                case "tokens":
                    world.append(chunk(0, count))
                case "disconnect":
                    world.connected = False
                case "reconnect":
                    world.reconnect()
                case "outage":
                    world.outages += count
                case "end":
                    world.append(completed(7))
                    return
                case "rest":
                    return

    world.on_pause = happen
    _, found = world.drive(flows.result(world.around, watch, None))
    assert len(found.token_ids) == 7


def test_a_job_followed_from_its_submission_costs_no_read_of_the_log() -> None:
    world = World()
    watch = world.watch()
    world.on_pause = Acts(world, [chunk(0, 3)], [chunk(3, 2), completed(5)])
    emitted, _ = world.drive(flows.stream(world.around, watch, TokenCursor(), None))
    assert [part.offset for part in emitted] == [0, 3]
    assert world.calls == []


def test_a_result_pushed_before_anyone_waits_costs_nothing() -> None:
    world = World()
    watch = world.watch(chunks=False)
    world.append(completed(2))
    _, found = world.drive(flows.result(world.around, watch, 0))
    assert (found.token_ids, world.calls) == ((0, 1), [])


def test_a_result_asked_for_after_the_first_tokens_passed_by_costs_nothing() -> None:
    world = World()
    watch = world.watch(chunks=False)
    world.append(chunk(0, 2))
    world.on_pause = Acts(world, [completed(2)])
    _, found = world.drive(flows.result(world.around, watch, None))
    assert (found.token_ids, world.calls) == ((0, 1), [])


def test_an_end_that_passed_by_and_was_not_kept_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.feed.KEPT_END_BYTES", 1)
    world = World()
    world.on_pause = Acts(world)  # nobody is to wait
    (feed,) = world.table.add_own(["job"])
    world.append(completed(2))
    inbox = Inbox(lambda: None, chunks=False)
    world.table.open(feed, inbox)
    _, found = world.drive(flows.result(world.around, flows.Watch(KEYS, "job", feed, inbox, None, True), None))
    assert (found.token_ids, world.calls) == ((0, 1), ["read_end"])


def test_an_outage_is_borne_for_the_clients_patience_and_not_longer() -> None:
    world = World(outages=10**6)
    with pytest.raises(BrokerUnavailable, match="down"):
        world.drive(flows.result(world.around, world.watch(push=False), None))
    assert SETTINGS.patience_s <= world.now < SETTINGS.patience_s + 0.01


def test_an_outage_is_borne_as_long_as_the_timeout_and_not_longer() -> None:
    world = World(outages=10**6)
    with pytest.raises(BrokerUnavailable, match="down"):
        world.drive(flows.result(world.around, world.watch(push=False), 60))
    assert 60 <= world.now < 60.01


def test_a_refusal_is_not_an_outage() -> None:
    world = World()

    def refuse(script: str, args: list[Any]) -> Any:
        raise BrokerUnavailable("wrong password") from AuthenticationError("WRONGPASS")

    world.reply = refuse  # type: ignore[method-assign]
    with pytest.raises(BrokerUnavailable, match="wrong password"):
        world.drive(flows.result(world.around, world.watch(push=False), None))
    assert world.now == 0


def test_silence_is_doubted_after_a_while() -> None:
    """A connection can die without a word; the log is looked at all the same."""
    world = World()
    watch = world.watch()
    world.connected = False
    world.on_pause = Acts(world, [chunk(0, 3)], [completed(3)])
    emitted, _ = world.drive(flows.stream(world.around, watch, TokenCursor(), None))
    assert [part.token_ids for part in emitted] == [(0, 1, 2)]
    assert world.now <= 3 * SETTINGS.backstop_s


def test_a_timeout_of_a_stream_is_the_longest_silence() -> None:
    world = World()
    watch = world.watch()
    said = iter(range(4))

    def happen() -> None:
        for offset in said:
            world.append(chunk(offset, 1))
            world.now += 2
            return

    world.on_pause = happen
    with pytest.raises(ResultTimeout, match="3 s"):
        world.drive(flows.stream(world.around, watch, TokenCursor(), 3))
    assert world.now >= 4 * 2 + 3


def test_a_deadline_that_nobody_enforces_is_enforced_by_who_waits() -> None:
    world = World()
    with pytest.raises(Exception, match="expired"):
        world.drive(flows.result(world.around, world.watch(chunks=False, deadline_at=2.0), None))
    assert world.calls.count("reclaim") == 1
    assert world.now == 2.0


def test_a_log_that_was_cut_is_an_error_and_not_a_gap() -> None:
    world = World()
    world.append(chunk(5, 2))
    with pytest.raises(JobNotFound, match="begins at offset 5"):
        world.drive(flows.stream(world.around, world.watch(push=False), TokenCursor(), None))
    world.log, world.state = [], "completed"
    with pytest.raises(JobNotFound, match="no longer kept"):
        world.drive(flows.stream(world.around, world.watch(push=False), TokenCursor(), None))


def job(size: int, **options: Any) -> NewJob:
    return NewJob(f"{size:032x}", b"x" * size, JobOptions(**options), 1, 1)


@given(sizes=st.lists(st.integers(1, 400), max_size=200))
def test_trips_are_bounded_and_carry_every_job_once_in_order(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.flows._CALL_JOBS", 10)
        patch.setattr("penstock.flows._CALL_BYTES", 1000)
        patch.setattr("penstock.flows._TRIP_BYTES", 3000)
        jobs = [job(size) for size in sizes]
        trips = list(flows._trips(KEYS, jobs, ""))
        carried = []
        for trip in trips:
            requests = [[arg for arg in call.args if isinstance(arg, bytes) and arg] for call in trip]
            assert all(len(part) <= 10 for part in requests)
            assert all(sum(map(len, part)) <= 1000 for part in requests)
            assert sum(len(request) for part in requests for request in part) < 3000 + 1000
            carried += [len(request) for part in requests for request in part]
        assert carried == sizes


def test_ten_thousand_small_jobs_are_one_round_trip() -> None:
    assert len(list(flows._trips(KEYS, [job(2000)] * 10_000, ""))) == 1


class Server:
    """Answers the effects of a submission that is to be on disk."""

    def __init__(
        self, *, waitaof: Any, appendonly: str = "yes", appendfsync: str = "everysec", on_disk: int = 1
    ) -> None:
        self.waitaof = waitaof
        self.settings = {"appendonly": appendonly, "appendfsync": appendfsync}
        self.on_disk = on_disk
        self.sent: list[str] = []

    def perform(self, effect: Effect) -> Any:
        match effect:
            case Command(("WAITAOF", *_)):
                if isinstance(self.waitaof, Exception):
                    raise self.waitaof
                return self.waitaof
            case Command(("CONFIG", "GET", str(name))):
                return {name: self.settings[name]}
            case Run(calls):
                self.sent.append("memory")
                return [call.parse([[b"accepted"]]) for call in calls]
            case RunToDisk(calls):
                self.sent.append("disk")
                return [call.parse([[b"accepted"]]) for call in calls], self.on_disk
        raise AssertionError(effect)


UNKNOWN = ResponseError("unknown command 'WAITAOF'")


@pytest.mark.parametrize(
    ("server", "sent"),
    [
        (Server(waitaof=[1, 0]), ["disk"]),
        (Server(waitaof=UNKNOWN, appendfsync="always"), ["memory"]),
    ],
    ids=["it waits for the disk", "every write is on disk anyway"],
)
def test_fsync_waits_for_the_disk(server: Server, sent: list[str]) -> None:
    world = World()
    world.perform = server.perform  # type: ignore[method-assign]
    _, outcomes = world.drive(flows.submit_jobs(world.around, KEYS, [job(1, durability="fsync")], ""))
    assert (server.sent, outcomes[0].status) == (sent, "accepted")


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (Server(waitaof=UNKNOWN), "appendfsync always"),
        (Server(waitaof=UNKNOWN, appendfsync="always", appendonly="no"), "appendonly yes"),
        (Server(waitaof=ResponseError("WAITAOF cannot be used: appendonly is disabled")), "appendonly is disabled"),
    ],
)
def test_fsync_is_refused_before_anything_is_stored(server: Server, why: str) -> None:
    world = World()
    world.perform = server.perform  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match=f"durability.*{why}"):
        world.drive(flows.submit_jobs(world.around, KEYS, [job(1, durability="fsync")], ""))
    assert server.sent == []


def test_a_disk_that_does_not_keep_up_is_an_error_that_says_the_job_is_in() -> None:
    world = World()
    world.perform = Server(waitaof=[1, 0], on_disk=0).perform  # type: ignore[method-assign]
    with pytest.raises(BrokerUnavailable, match="stored, but not on disk"):
        world.drive(flows.submit_jobs(world.around, KEYS, [job(1, durability="fsync")], ""))


def test_tickets_tell_new_jobs_from_earlier_ones_and_from_refusals() -> None:
    jobs = [job(1), job(2), job(3, deadline_s=9), job(4)]
    outcomes = [
        SubmitOutcome(jobs[0].job_id, "accepted"),
        SubmitOutcome("earlier", "duplicate"),
        SubmitOutcome(jobs[2].job_id, "duplicate"),  # our own, whose first answer was lost
        SubmitOutcome(jobs[3].job_id, "full", 2.5, "too many"),
    ]
    feeds = FeedTable().add_own([each.job_id for each in jobs])
    new, earlier, repeated, refused = tickets_of(jobs, outcomes, feeds, "me", lambda: 100.0)
    assert new == Ticket(jobs[0].job_id, feed=feeds[0], client_id="me", knows_deadline=True)
    assert earlier == Ticket("earlier", duplicate=True)
    assert isinstance(repeated, Ticket)
    assert (repeated.duplicate, repeated.feed, repeated.deadline_at) == (False, feeds[2], 109.0)
    assert isinstance(refused, QueueFull)
    assert refused.retry_after_s == 2.5


def test_a_feed_of_another_process_is_not_used() -> None:
    class Recorder:
        client_id = "child"

        def watch(self, keys: QueueKeys, job_id: str, feed: Any, *, chunks: bool) -> Any:
            return feed or attached, Inbox(lambda: None, chunks=chunks)

        def unwatch(self, keys: QueueKeys, feed: Any, inbox: Inbox) -> None:
            """Nothing to close."""

    (feed, attached) = FeedTable().add_own(["job", "attached"])
    with watching(Recorder(), KEYS, Ticket("job", feed=feed, client_id="parent"), chunks=True) as watch:
        assert watch.feed is attached
    with watching(Recorder(), KEYS, Ticket("job", feed=feed, client_id="child"), chunks=True) as watch:
        assert watch.feed is feed
