"""arq with polls of two milliseconds instead of its half second, on both sides."""

import asyncio

import measure
from arq import create_pool
from arq.connections import RedisSettings

WORKER = ["-m", "arq", "arq_queue.WorkerSettings"]


async def work(ctx, numbers):
    return numbers[:32]


class WorkerSettings:
    functions = [work]
    redis_settings = RedisSettings.from_dsn(measure.redis_url())
    poll_delay = 0.002
    max_jobs = 64
    queue_read_limit = 256


async def produce():
    pool = await create_pool(WorkerSettings.redis_settings)
    await measure.main_async(
        lambda numbers: pool.enqueue_job("work", numbers),
        lambda job: job.result(timeout=60, poll_delay=0.002),
    )


if __name__ == "__main__":
    asyncio.run(produce())
