"""Why a checkpoint is not loaded. A checkpoint is loaded whole or refused by name, never half."""

from __future__ import annotations

from penstock_core.protocol.errors import PenstockError


class UnsupportedModel(PenstockError, ValueError):
    """The checkpoint asks for something Penstock does not compute; the message says what, and what is supported."""


class BrokenCheckpoint(PenstockError, ValueError):
    """The checkpoint's files are missing, damaged, or do not fit its own config.json."""
