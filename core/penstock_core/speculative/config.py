"""SpeculationConfig: who drafts, how deep at most, and what drafting may remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from penstock_core.cache import PageConfig
from penstock_core.protocol.errors import InvalidConfiguration

PROPOSERS = ("auto", "draft", "ngram", "suffix")


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Settings of a `SpeculativeDecoder`. None of them changes an output; they change its speed.

    Attributes:
        proposer: `draft` (a small model), `ngram` (look the last tokens up in prompt and output), `suffix` (the same,
            and in what this worker has generated), or `auto`: whichever gains most, for each sequence and step.
        draft_model: checkpoint folder or hub id of the draft model, of the same vocabulary. None: the folder beside
            the model's that is named like it with `-draft` added, if there is one.
        max_depth: most tokens drafted per sequence and step.
        fixed_depth: always draft this many (for tests and measurements). None: as many as pay, down to none.
        min_match, max_match: shortest and longest run of last tokens that a lookup compares.
        learned_tokens: generated tokens that the suffix proposer remembers; older ones are forgotten first.
        draft_pages: page pool of the draft model.
    """

    proposer: str = "auto"
    draft_model: str | Path | None = None
    max_depth: int = 8
    fixed_depth: int | None = None
    min_match: int = 2
    max_match: int = 16
    learned_tokens: int = 65_536
    draft_pages: PageConfig = field(default_factory=lambda: PageConfig(memory_fraction=0.1))

    def __post_init__(self) -> None:
        if self.proposer not in PROPOSERS:
            raise InvalidConfiguration(
                "speculation.proposer", f"{self.proposer!r} is unknown; use one of {', '.join(PROPOSERS)}"
            )
        if not 1 <= self.max_depth <= 64:
            raise InvalidConfiguration("speculation.max_depth", f"{self.max_depth} is outside 1 to 64 tokens")
        if self.fixed_depth is not None and not 0 <= self.fixed_depth <= self.max_depth:
            raise InvalidConfiguration(
                "speculation.fixed_depth", f"{self.fixed_depth} is outside 0 to max_depth ({self.max_depth})"
            )
        if not 1 <= self.min_match <= self.max_match:
            raise InvalidConfiguration(
                "speculation.min_match", f"{self.min_match} is outside 1 to max_match ({self.max_match})"
            )
        if self.learned_tokens < 0:
            raise InvalidConfiguration("speculation.learned_tokens", f"{self.learned_tokens} is below 0")

    @property
    def may_use_draft_model(self) -> bool:
        """Whether a draft model is wanted, if there is one."""
        return self.proposer in ("auto", "draft")


def beside(model: Path) -> Path | None:
    """The draft checkpoint that came with a model: the folder `<model>-draft` next to it."""
    folder = model.with_name(model.name + "-draft")
    return folder if (folder / "config.json").exists() else None
