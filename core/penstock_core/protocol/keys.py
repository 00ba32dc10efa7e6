"""Every Redis key of a queue, in one place: its name, type, owner and lifetime.

The braces make all keys of a queue hash to one Cluster slot, so that a transition can be one script. `q` below is the
queue's name, by default the served name of the model its workers run.

| key | type | what | lifetime |
|---|---|---|---|
| `penstock:{q}:ready:<p>:<tenant>` | stream | waiting jobs of a priority and tenant: pointers, in order of arrival | deleted when empty |
| `penstock:{q}:resume:<p>:<tenant>` | stream | interrupted jobs, served before `ready` | deleted when empty |
| `penstock:{q}:heads:<p>` | zset | tenants with waiting jobs at a priority, by arrival time of their oldest | while jobs wait |
| `penstock:{q}:fair:<p>` | zset | the same tenants by virtual token count | while jobs wait |
| `penstock:{q}:tenants` | zset | virtual token count of tenants above the least backlogged one | the queue's |
| `penstock:{q}:tenant:<tenant>` | hash | its jobs queued, delayed, running; its token bucket | 1 hour once it has no job |
| `penstock:{q}:job:<id>` | hash | request, state, attempt, owner, counts, timings, result | result TTL once ended |
| `penstock:{q}:events:<id>` | stream | the token log and the end mark | result TTL once ended |
| `penstock:{q}:channel:<id>` | pub/sub | the same events, pushed | none |
| `penstock:{q}:client:<client>` | pub/sub | events of all jobs of one client process, coalesced | none |
| `penstock:{q}:bell` | pub/sub | doorbell for workers: `job`, `cancel <id>` | none |
| `penstock:{q}:leases` | zset | running jobs by lease expiry | while jobs run |
| `penstock:{q}:held:<worker>` | set | running jobs of a worker | while it holds any |
| `penstock:{q}:delayed` | zset | scheduled jobs and backoffs by due time | while jobs are delayed |
| `penstock:{q}:deadlines` | zset | waiting jobs with a deadline, by deadline | while such jobs exist |
| `penstock:{q}:workers` | hash | worker id -> record (model, capacity, ...) | removed when gone |
| `penstock:{q}:heartbeats` | zset | worker id by time of its last sign of life | removed when gone |
| `penstock:{q}:dead` | stream | dead letters: id, reason, time | bounded by `max_dead` |
| `penstock:{q}:dedupe:<tenant>:<key>` | string | idempotency key -> job id | as long as its job |
| `penstock:{q}:recent`, `:recent:<tenant>` | list | the newest 10,000 jobs, and 1,000 of a tenant, by submission; listings read it | 31 days after the last one |
| `penstock:{q}:affinity` | hash | slot of a cache-affinity tag -> the worker that last ran one, and when | the queue's; at most 65,536 slots |
| `penstock:{q}:rate:<fingerprint>` | hash | requests an API key may still make, and when that was known | a minute |
| `penstock:{q}:stats` | hash | counters and gauges of the queue | the queue's |
| `penstock:{q}:config` | hash | the operator's bounds for the queue | the queue's |
| `penstock:{q}:file:<id>` | hash | a gateway's uploaded or produced file: owner, name, size | file TTL |
| `penstock:{q}:filedata:<id>` | string | its bytes | file TTL |
| `penstock:{q}:files:<tenant>` | zset | a tenant's files by time of creation | file TTL after the last one |
| `penstock:{q}:batch:<id>` | hash | a gateway's batch: its record, progress and driver | its window plus the file TTL |
| `penstock:{q}:batches:<tenant>` | zset | a tenant's batches by time of creation | as its youngest batch |
| `penstock:{q}:batchwork` | zset | unfinished batches by when another gateway may drive them | while they are unfinished |
"""

# ruff: noqa: E501  (the catalogue is a table)
from __future__ import annotations

import re
from dataclasses import dataclass

from penstock_core.protocol.errors import InvalidRequest

DEFAULT_TENANT = "default"
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$"
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/\-]{0,127}")


EVERY_STATS = "penstock:{*}:stats"
"""Pattern of the one key that every queue has once it was used, to find the queues of a server with SCAN."""


def queue_of_stats(key: str) -> str:
    """The queue whose `stats` key this is."""
    return key.removeprefix("penstock:{").removesuffix("}:stats")


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Key names of one queue."""

    queue: str

    def __post_init__(self) -> None:
        if not _QUEUE_NAME.fullmatch(self.queue):
            raise InvalidRequest(
                "queue", f"{self.queue!r} is no queue name; use 1 to 128 letters, digits or any of _ . : / -"
            )

    @property
    def prefix(self) -> str:
        """What every key of the queue starts with."""
        return f"penstock:{{{self.queue}}}:"

    def ready(self, priority: int, tenant: str) -> str:
        """Stream of waiting jobs."""
        return f"{self.prefix}ready:{priority}:{tenant}"

    def resume(self, priority: int, tenant: str) -> str:
        """Stream of interrupted jobs."""
        return f"{self.prefix}resume:{priority}:{tenant}"

    def heads(self, priority: int) -> str:
        """Zset of tenants with waiting jobs, by oldest arrival."""
        return f"{self.prefix}heads:{priority}"

    def fair(self, priority: int) -> str:
        """Zset of tenants with waiting jobs, by virtual token count."""
        return f"{self.prefix}fair:{priority}"

    def tenant(self, tenant: str) -> str:
        """Hash of a tenant's counts."""
        return f"{self.prefix}tenant:{tenant}"

    def dedupe(self, tenant: str, idempotency_key: str) -> str:
        """String that maps an idempotency key to its job."""
        return f"{self.prefix}dedupe:{tenant}:{idempotency_key}"

    def rate(self, fingerprint: str) -> str:
        """Hash of an API key's bucket of requests."""
        return f"{self.prefix}rate:{fingerprint}"

    @property
    def affinity(self) -> str:
        """Hash of cache-affinity slots."""
        return self.prefix + "affinity"

    def job(self, job_id: str) -> str:
        """Hash of a job."""
        return f"{self.prefix}job:{job_id}"

    def events(self, job_id: str) -> str:
        """Token log of a job."""
        return f"{self.prefix}events:{job_id}"

    def channel(self, job_id: str) -> str:
        """Channel of a job's events."""
        return f"{self.prefix}channel:{job_id}"

    def client(self, client_id: str) -> str:
        """Channel of a client process."""
        return f"{self.prefix}client:{client_id}"

    def held(self, worker_id: str) -> str:
        """Set of jobs a worker runs."""
        return f"{self.prefix}held:{worker_id}"

    @property
    def bell(self) -> str:
        """Doorbell channel of the workers."""
        return self.prefix + "bell"

    @property
    def leases(self) -> str:
        """Zset of leases."""
        return self.prefix + "leases"

    @property
    def delayed(self) -> str:
        """Zset of delayed jobs."""
        return self.prefix + "delayed"

    @property
    def deadlines(self) -> str:
        """Zset of waiting jobs with a deadline."""
        return self.prefix + "deadlines"

    @property
    def heartbeats(self) -> str:
        """Zset of workers by last sign of life."""
        return self.prefix + "heartbeats"

    @property
    def workers(self) -> str:
        """Hash of worker records."""
        return self.prefix + "workers"

    @property
    def tenants(self) -> str:
        """Zset of virtual token counts."""
        return self.prefix + "tenants"

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return self.prefix + "dead"

    @property
    def stats(self) -> str:
        """Hash of counters."""
        return self.prefix + "stats"

    @property
    def config(self) -> str:
        """Hash of the operator's bounds."""
        return self.prefix + "config"

    def file(self, file_id: str) -> str:
        """Hash of a gateway's file."""
        return f"{self.prefix}file:{file_id}"

    def filedata(self, file_id: str) -> str:
        """The file's bytes."""
        return f"{self.prefix}filedata:{file_id}"

    def files(self, tenant: str) -> str:
        """Zset of a tenant's files."""
        return f"{self.prefix}files:{tenant}"

    def batch(self, batch_id: str) -> str:
        """Hash of a gateway's batch."""
        return f"{self.prefix}batch:{batch_id}"

    def batches(self, tenant: str) -> str:
        """Zset of a tenant's batches."""
        return f"{self.prefix}batches:{tenant}"

    @property
    def batchwork(self) -> str:
        """Zset of unfinished batches."""
        return self.prefix + "batchwork"
