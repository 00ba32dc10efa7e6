"""A driven queue on every broker: fakeredis and each real Redis version."""

from __future__ import annotations

import pytest
import redis

from penstock_core.protocol.keys import QueueKeys
from tests.queue_driver import QueueDriver


@pytest.fixture
def driver(broker: redis.Redis, keys: QueueKeys) -> QueueDriver:
    return QueueDriver(broker, keys)
