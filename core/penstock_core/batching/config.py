"""BatchingConfig: the batcher's settings, and the order of service they define."""

from __future__ import annotations

from dataclasses import dataclass

from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Settings of the TokenBatcher.

    Sequences are served in order of `urgency = arrival time - priority * aging_interval_s`, least first. One level of
    priority is thus worth `aging_interval_s` of waiting: nothing starves, and the order of two sequences never changes.

    Attributes:
        max_num_sequences: sequences that run at once (choices count one each).
        max_batch_tokens: token budget of a step, at least `max_num_sequences`.
        max_model_len: longest prompt plus output, in tokens.
        watermark_pages: pages that an admission leaves available while others run.
        aging_interval_s: see above.
        preemption_margin: a waiting sequence displaces a running one only if it is more urgent by this many levels of
            priority (hysteresis). None: priorities order the waiting ones only.
        preemption_min_steps: steps a sequence may run undisturbed after it was admitted.
        target_step_ms: hold the step time, and so the time between tokens, near this by moving the token budget
            (dynamic batch resizing). None: the budget is always `max_batch_tokens`.
    """

    max_num_sequences: int = 64
    max_batch_tokens: int = 2048
    max_model_len: int = 4096
    watermark_pages: int = 0
    aging_interval_s: float = 60.0
    preemption_margin: float | None = 0.5
    preemption_min_steps: int = 8
    target_step_ms: float | None = None

    def __post_init__(self) -> None:
        if self.max_num_sequences < 1:
            raise InvalidConfiguration("max_num_sequences", f"{self.max_num_sequences} is below 1")
        if self.max_batch_tokens < self.max_num_sequences:
            raise InvalidConfiguration(
                "max_batch_tokens",
                f"{self.max_batch_tokens} is below max_num_sequences ({self.max_num_sequences}): each running sequence "
                "needs one token of each step's budget; raise the one or lower the other",
            )
        if self.max_model_len < 2:
            raise InvalidConfiguration("max_model_len", f"{self.max_model_len} has no room for a prompt and an output")
        if self.aging_interval_s <= 0.0:
            raise InvalidConfiguration("aging_interval_s", f"{self.aging_interval_s} is not above 0 seconds")
        if self.preemption_margin is not None and self.preemption_margin < 0.0:
            raise InvalidConfiguration("preemption_margin", f"{self.preemption_margin} is below 0 levels of priority")
        if self.target_step_ms is not None and self.target_step_ms <= 0.0:
            raise InvalidConfiguration("target_step_ms", f"{self.target_step_ms} is not above 0 milliseconds")

    def urgency(self, arrival_s: float, priority: int) -> float:
        """Order of service; the most urgent has the least."""
        return arrival_s - priority * self.aging_interval_s
