"""RQ with one SimpleWorker (no fork per job, its fastest form); results awaited by its blocking read."""

import measure

WORKER = ["-m", "rq.cli", "worker", "--worker-class", "rq.SimpleWorker", "--quiet", "bench"]


def work(numbers):
    return numbers[:32]


if __name__ == "__main__":
    from redis import Redis
    from rq import Queue

    queue = Queue("bench", connection=Redis.from_url(measure.redis_url()))
    measure.main(
        lambda numbers: queue.enqueue("rq_queue.work", numbers),
        lambda job: job.latest_result(timeout=60).return_value,
    )
