"""taskiq on Redis Streams, results polled every millisecond instead of its fifth of a second."""

import asyncio

import measure
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

broker = RedisStreamBroker(measure.redis_url()).with_result_backend(RedisAsyncResultBackend(measure.redis_url()))
WORKER = [
    "-m",
    "taskiq",
    "worker",
    "taskiq_queue:broker",
    "--workers",
    "1",
    "--log-level",
    "ERROR",
    "--max-prefetch",
    "64",
]


@broker.task
async def work(numbers):
    return numbers[:32]


async def produce():
    await broker.startup()

    async def result(task):
        return (await task.wait_result(check_interval=0.001, timeout=60)).return_value

    await measure.main_async(work.kiq, result)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(produce())
