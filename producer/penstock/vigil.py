"""Waiting for a job without hanging: timeouts, outages of the broker, silence, deadlines that nobody enforces. No I/O.

Used by the flows that follow a job. A vigil decides how long to pause, when to distrust silence, when to give up and
with which words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from penstock.effects import Confirm, Flow, Pause, Run
from penstock.feed import Inbox
from penstock.outcome import describe
from penstock.settings import ClientSettings
from penstock_core.protocol.errors import BrokerUnavailable, ClientClosed, InvalidRequest, JobNotFound, ResultTimeout
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import Call, read_job, reclaim

T = TypeVar("T")

_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.05, 2.0
_POLL_GROWTH = 1.5
_BACKSTOP_GROWTH = 8
_SWEEP_LIMIT = 1000
_SWEEP_AGAIN_S = 0.5


def _is_permanent(error: BrokerUnavailable) -> bool:
    """Whether the broker answers, and refuses whatever we do."""
    from redis.exceptions import AuthenticationError, NoPermissionError

    return isinstance(error.__cause__, AuthenticationError | NoPermissionError)


class Outage:
    """Bears a broker that cannot be reached, for a while.

    Args:
        patience_s: how long, where `give_up_at` is None.
        clock: monotonic seconds.
        give_up_at: when waiting is over whatever the broker does.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float], give_up_at: float | None = None) -> None:
        self.give_up_at = give_up_at
        self._patience_s = patience_s
        self._clock = clock
        self._ends_at: float | None = None
        self._delay_s = _BACKOFF_FIRST_S

    def bear(self, error: BrokerUnavailable) -> Flow[None]:
        """Wait before the next try, or raise `error` if there shall be none. Full jitter, so that clients spread."""
        now = self._clock()
        if self._ends_at is None:
            self._ends_at = now + self._patience_s if self.give_up_at is None else self.give_up_at
        if now >= self._ends_at or isinstance(error, ClientClosed) or _is_permanent(error):
            raise error
        yield Pause(None, min(random.uniform(0, self._delay_s), self._ends_at - now))
        self._delay_s = min(2 * self._delay_s, _BACKOFF_MAX_S)

    def over(self) -> None:
        """The broker answered."""
        self._ends_at, self._delay_s = None, _BACKOFF_FIRST_S


class Vigil:
    """One wait for one job.

    Args:
        keys, job_id: whom to wait for.
        inbox: where events are pushed; None polls.
        timeout_s: None waits for as long as it takes.
        deadline_at: when the job's deadline passes, by `clock`; None if it has none, or it is not known here.
        knows_deadline: whether a `deadline_at` of None means that there is none.
    """

    def __init__(
        self,
        keys: QueueKeys,
        job_id: str,
        inbox: Inbox | None,
        settings: ClientSettings,
        clock: Callable[[], float],
        *,
        timeout_s: float | None,
        deadline_at: float | None,
        knows_deadline: bool,
    ) -> None:
        if timeout_s is not None and not 0 <= timeout_s <= 1e9:
            raise InvalidRequest(
                "timeout", f"{timeout_s!r} is no time to wait; use seconds from 0, or None for no limit"
            )
        self._keys = keys
        self._job_id = job_id
        self._inbox = inbox
        self._settings = settings
        self._clock = clock
        self._timeout_s = timeout_s
        self._end_at = clock() + timeout_s if timeout_s is not None else None
        self._outage = Outage(settings.patience_s, clock, self._end_at)
        self._backstop_s = settings.backstop_s
        self._look_at = clock() + self._backstop_s
        self._poll_s = settings.poll_min_s
        self._sweep_at = deadline_at
        self._knows_deadline = knows_deadline

    def ask(self, call: Call[T]) -> Flow[T]:
        """Execute a call, bearing outages."""
        while True:
            try:
                answer: list[T] = yield Run((call,))
            except BrokerUnavailable as error:
                yield from self._outage.bear(error)
            else:
                self._outage.over()
                return answer[0]

    def listen(self, channel: str) -> Flow[None]:
        """Wait until messages of the channel arrive, bearing outages."""
        while True:
            try:
                yield Confirm(channel)
            except BrokerUnavailable as error:
                yield from self._outage.bear(error)
            else:
                self._outage.over()
                return

    def heard(self, *, restart_timeout: bool) -> None:
        """There was news of the job; silence counts from now, and with `restart_timeout` so does the timeout."""
        now = self._clock()
        self._backstop_s = self._settings.backstop_s
        self._look_at = now + self._backstop_s
        self._poll_s = self._settings.poll_min_s
        if restart_timeout and self._timeout_s is not None:
            self._end_at = self._outage.give_up_at = now + self._timeout_s

    def rest(self) -> Flow[bool]:
        """Wait for news; returns whether Redis itself must be looked at.

        Raises:
            ResultTimeout: the time is up and the job has not ended.
            BrokerUnavailable: the time, or the patience with an outage, is up.
            JobNotFound: the job is gone.
        """
        until = self._look_at
        if self._inbox is None:
            until = min(until, self._clock() + self._poll_s)
            self._poll_s = min(self._poll_s * _POLL_GROWTH, self._settings.poll_max_s)
        for limit in (self._end_at, self._sweep_at):
            if limit is not None:
                until = min(until, limit)
        yield Pause(self._inbox, max(0.0, until - self._clock()))
        if self._inbox is not None and not self._inbox.is_quiet:
            return False
        now = self._clock()
        if self._sweep_at is not None and now >= self._sweep_at:
            # The deadline has passed in silence. Where no worker is alive, nobody but us will see to it.
            yield from self.ask(reclaim(self._keys, limit=_SWEEP_LIMIT))
            self._sweep_at = self._clock() + _SWEEP_AGAIN_S
            return True
        if self._end_at is not None and now >= self._end_at:
            yield from self._time_is_up()
            return True
        if now >= self._look_at:
            self._backstop_s = min(2 * self._backstop_s, _BACKSTOP_GROWTH * self._settings.backstop_s)
            self._look_at = now + self._backstop_s
            if not self._knows_deadline:
                yield from self._learn_deadline()
            return True
        return self._inbox is None

    def _time_is_up(self) -> Flow[None]:
        status = yield from self.ask(read_job(self._keys, self._job_id))
        if status is None:
            raise not_found(self._keys, self._job_id)
        if not status.state.is_terminal:
            raise ResultTimeout(
                f"job {self._job_id} has not ended after {self._timeout_s:g} s: {describe(status)}. "
                "It goes on; call again to wait longer, or cancel() it"
            )

    def _learn_deadline(self) -> Flow[None]:
        status = yield from self.ask(read_job(self._keys, self._job_id))
        if status is not None:
            self._knows_deadline = True
            if status.deadline_ms is not None:
                # The deadline is by the server's clock. A sweep ends what is due by that clock, and nothing else.
                self._sweep_at = self._clock()


def not_found(keys: QueueKeys, job_id: str) -> JobNotFound:
    """The error for a job that Redis does not know."""
    return JobNotFound(
        f"no job {job_id} in queue {keys.queue}: it was never submitted there, or its result_ttl_s has passed"
    )
