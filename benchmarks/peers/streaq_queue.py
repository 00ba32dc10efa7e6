"""streaq (Redis Streams, priorities) with one worker process.

Results are polled every two milliseconds: its own `result()` subscribes per job, which takes some 100 ms each.
"""

import asyncio
import logging

import measure
from streaq import Worker

logging.getLogger("streaq").setLevel(logging.ERROR)
worker = Worker(redis_url=measure.redis_url(), concurrency=64)
WORKER = ["-m", "streaq", "run", "streaq_queue:worker"]


@worker.task()
async def work(numbers):
    return numbers[:32]


async def produce():
    async with worker:

        async def submit(numbers):
            return await work.enqueue(numbers)

        async def result(task):
            async with asyncio.timeout(60):
                while not await worker.redis.exists([worker.results_key + task.id]):
                    await asyncio.sleep(0.002)
                return (await worker.deserialize(await worker.redis.get(worker.results_key + task.id)))["r"]

        await measure.main_async(submit, result)


if __name__ == "__main__":
    asyncio.run(produce())
