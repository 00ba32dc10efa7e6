"""Dramatiq with Redis as broker and result backend, one worker process of eight threads (its default)."""

import dramatiq
import measure
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

broker = RedisBroker(url=measure.redis_url())
broker.add_middleware(Results(backend=RedisBackend(url=measure.redis_url())))
dramatiq.set_broker(broker)
WORKER = ["-m", "dramatiq", "dramatiq_queue", "--processes", "1", "--threads", "8"]


@dramatiq.actor(store_results=True)
def work(numbers):
    return numbers[:32]


if __name__ == "__main__":
    measure.main(work.send, lambda message: message.get_result(block=True, timeout=60_000))
