"""Celery with Redis as broker and backend, one solo worker process."""

import measure
from celery import Celery

app = Celery("bench", broker=measure.redis_url(), backend=measure.redis_url())
app.conf.update(
    task_ignore_result=False,
    worker_prefetch_multiplier=64,
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
)
WORKER = [
    "-m",
    "celery",
    "-A",
    "celery_queue",
    "worker",
    "--pool=solo",
    "--loglevel=ERROR",
    "--without-gossip",
    "--without-mingle",
]


@app.task(name="work")
def work(numbers):
    return numbers[:32]


if __name__ == "__main__":
    measure.main(work.delay, lambda handle: handle.get(timeout=60))
