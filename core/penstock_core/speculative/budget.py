"""How much time drafting may lose, and whether it pays: by what was measured, whatever any estimate says.

A wrong idea of what pays costs time only while it is acted on. `LossBudget` bounds that time for a whole worker, and a
`Standing` per kind of drafts and size of batch says whether they gain: drafting is tried in a run of steps, kept while
it gains, and otherwise left alone for longer and longer. Both outlive sequences: a new one begins with what is known.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHARE = 0.01  # of all time, that may be lost to drafting
_FIRST_STEPS = 6.0  # plain steps that may be lost before anything was saved up
_MOST_STEPS = 24.0  # plain steps that may be saved up
_DEEPEST_STEPS = 2.0 * _MOST_STEPS  # of debt
_COLD_STEPS = 4  # of a try: they bring weights into the caches, and meet sizes of steps for the first time
_TRY_STEPS, _LONGEST_TRY_STEPS = 20, 80
_CLOSE = 1.1  # time over plain time up to which a try goes on, and may be repeated soon: it costs little
_MEMORY = 1.0 - 1.0 / 32  # of a step's figures, per later step
_HOPELESS_STEPS, _HOPELESS = 10, 1.25  # steps of a try after which it ends if they took so much longer than plain ones
_PAUSE_STEPS, _LONGEST_PAUSE_STEPS = 64, 1024
_LASTING_STEPS = 64  # that drafting went well, after which its failure is a new fact


class LossBudget:
    """Time that may be lost: a small share of all that is spent; what drafting gains counts too, up to a limit.

    It is counted in plain steps of the batch's size at the time: a loss in large batches, whose steps are long, is not
    to keep small ones from what pays there. A debt has a limit as well, from which the first gain leads back.

    Attributes:
        balance: plain steps that may be lost at the moment.
    """

    def __init__(self) -> None:
        self.balance = _FIRST_STEPS

    def earn(self, spent_s: float, saved_s: float, plain_step_s: float) -> None:
        """Count time that passed, and what drafting saved of it (or lost: below 0); a plain step takes that long."""
        balance = self.balance + (_SHARE * spent_s + saved_s) / plain_step_s
        self.balance = max(-_DEEPEST_STEPS, min(balance, _MOST_STEPS))

    @property
    def is_overdrawn(self) -> bool:
        """Whether far more was lost than ever may be: the machine is so busy that steps with drafts stall."""
        return self.balance <= -_DEEPEST_STEPS

    def affords(self, loss_s: float, plain_step_s: float) -> bool:
        """Whether such a loss can be borne, or all has been saved up that can be."""
        return self.balance > min(loss_s / plain_step_s, 0.9 * _MOST_STEPS)


@dataclass(slots=True)
class Standing:
    """Whether drafting of one kind pays for batches of about one size.

    Attributes:
        pays: it did when last tried. tried: steps of the try under way; 0: none is.
        plain_s, spent_s: what the latest steps would have taken plainly, and did take; fading.
        lost_s: by the latest try. next_try: number of the step from which it is tried again. pause: steps until then.
        since: number of the step at which it began to pay.
    """

    pays: bool = False
    tried: int = 0
    plain_s: float = 0.0
    spent_s: float = 0.0
    lost_s: float = 0.0
    next_try: int = 0
    pause: int = _PAUSE_STEPS
    since: int = 0

    @property
    def is_trying(self) -> bool:
        """Whether drafts are to be checked even if they are not expected to pay."""
        return self.tried > 0

    def allows(self, step: int, budget: LossBudget, plain_step_s: float) -> bool:
        """Whether to draft in step number `step`; begins a try where one is due and can be afforded."""
        if self.pays or self.tried:
            return True
        if step < self.next_try or not budget.affords(self.lost_s, plain_step_s):
            return False
        self.tried = 1
        self.plain_s = self.spent_s = self.lost_s = 0.0
        return True

    def record(self, plain_s: float, spent_s: float, step: int, budget: LossBudget) -> None:
        """A step with such drafts took `spent_s`; plainly, its tokens would have taken `plain_s`."""
        self.plain_s, self.spent_s = self.plain_s * _MEMORY + plain_s, self.spent_s * _MEMORY + spent_s
        if self.tried:
            self.lost_s += spent_s - plain_s
            if self.tried == _COLD_STEPS:
                self.plain_s = self.spent_s = 0.0
            self.tried += 1
            gains, close = self.plain_s > self.spent_s, self.spent_s < _CLOSE * self.plain_s
            hopeless = self.tried > _HOPELESS_STEPS and self.spent_s > _HOPELESS * self.plain_s
            if self.tried <= _TRY_STEPS and budget.balance >= 0.0 and not hopeless:
                return
            if gains:
                self.pays, self.tried, self.since = True, 0, step
            elif not close or self.tried > _LONGEST_TRY_STEPS or budget.balance < 0.0:
                self._leave(step, self.pause if close else 2 * self.pause)
        elif self.spent_s > self.plain_s or budget.is_overdrawn:
            self._leave(step, _PAUSE_STEPS if step - self.since > _LASTING_STEPS else 2 * self.pause)

    def inherit(self, other: Standing) -> None:
        """Begin with what holds for a batch of another size."""
        self.pays, self.plain_s, self.spent_s, self.since = other.pays, other.plain_s, other.spent_s, other.since
        self.lost_s, self.pause, self.next_try = other.lost_s, other.pause, other.next_try

    def _leave(self, step: int, pause: int) -> None:
        self.pays, self.tried = False, 0
        self.next_try = step + self.pause
        self.pause = min(pause, _LONGEST_PAUSE_STEPS)


class Standings:
    """The standings of one kind of drafts, by size of batch.

    A size not met yet begins like the nearest, unless that is larger and failed: fewer sequences leave more room.
    """

    def __init__(self) -> None:
        self._by_size: dict[int, Standing] = {}

    def of(self, sequences: int) -> Standing:
        """The standing for so many sequences."""
        size = _size(sequences)
        standing = self._by_size.get(size)
        if standing is None:
            standing = Standing()
            if self._by_size:
                nearest = min(self._by_size, key=lambda known: abs(known - size))
                if nearest < size or self._by_size[nearest].pays:
                    standing.inherit(self._by_size[nearest])
            self._by_size[size] = standing
        return standing


def _size(sequences: int) -> int:
    """1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16 and so on: two sizes per doubling."""
    if sequences <= 4:
        return sequences
    octave = (sequences - 1).bit_length()
    return 2 * octave + (sequences > 3 << (octave - 2)) - 1
