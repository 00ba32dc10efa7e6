"""How the ranks of a group find one another, and how they agree that they are one group.

Through a file, where rank 0 started the others; through a TCP store, where torchrun (or someone who sets the same
variables) started them all. Before anything is loaded every rank says what it is about to run; one that disagrees ends
the group, with the reason told on all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore  # as torch.distributed has them, typed
from torch.distributed import DistNetworkError

from penstock_core.protocol.errors import EngineFailed, InvalidConfiguration

Watch = Callable[[], str | None]  # which rank has ended, if one has

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place, as its launcher says.

    Attributes:
        local_rank, local_size: among the ranks of its host.
        host, port: of the store, where the ranks do not meet in a file. owns_store: whether this process serves it.
        prefix: of the keys, new for every start of the group.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str = ""
    port: int = 0
    owns_store: bool = False
    prefix: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place | None:
        """What torchrun set; None where this process was not started so.

        Raises:
            InvalidConfiguration: a variable is not a number, or rank and size contradict.
        """
        if any(not environment.get(name) for name in _VARIABLES):
            return None

        def number(name: str, default: int | None = None) -> int:
            text = environment.get(name) or str(default)
            if not text.isdecimal():
                raise InvalidConfiguration(name, f"{text!r} is not a number; start the ranks with torchrun")
            return int(text)

        rank, size = number("RANK"), number("WORLD_SIZE")
        if rank >= size:
            raise InvalidConfiguration("RANK", f"{rank} is not below WORLD_SIZE {size}")
        launched = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then the launcher serves the port
        return cls(
            rank,
            size,
            number("LOCAL_RANK", rank),
            number("LOCAL_WORLD_SIZE", size),
            environment["MASTER_ADDR"],
            number("MASTER_PORT"),
            owns_store=rank == 0 and not launched,
            prefix=f"penstock/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )


@dataclass(slots=True)
class Rendezvous:
    """A store that all ranks of the group read and write.

    Attributes:
        place: this rank's. watch: tells a rank that has ended, so that nobody waits for it.
    """

    place: Place
    store: Store
    timeout_s: float
    watch: Watch = field(default=lambda: None)

    @classmethod
    def in_file(cls, path: Path, place: Place, timeout_s: float, watch: Watch = lambda: None) -> Rendezvous:
        """Meet in a file of this host."""
        store = FileStore(str(path), place.size)
        store.set_timeout(timedelta(seconds=timeout_s))
        return cls(place, store, timeout_s, watch)

    @classmethod
    def over_tcp(cls, place: Place, timeout_s: float) -> Rendezvous:
        """Meet at the address that the launcher says.

        Raises:
            InvalidConfiguration: the port is in use.
            EngineFailed: nobody answers there.
        """
        try:
            store = TCPStore(
                place.host,
                place.port,
                place.size,
                is_master=place.owns_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            if place.owns_store and "EADDRINUSE" in str(error):
                raise InvalidConfiguration("MASTER_PORT", f"{place.port} is in use; choose another") from error
            raise EngineFailed(
                f"rank {place.rank}: nobody answers at MASTER_ADDR {place.host}, MASTER_PORT {place.port}, within "
                f"{timeout_s:.0f} s; start rank 0 there, and see that the port is open"
            ) from error
        return cls(place, PrefixStore(place.prefix, store), timeout_s)

    def say(self, key: str, value: str) -> None:
        """Write a value once, for all to read."""
        self.store.set(key, value)

    def hear(self, key: str) -> str:
        """Wait for a value.

        Raises:
            EngineFailed: a rank ended meanwhile, or did not say it in time.
        """
        deadline = time.monotonic() + self.timeout_s
        try:
            while not self.store.check([key]):
                fallen = self.watch()
                if fallen is not None:
                    raise EngineFailed(f"{fallen} while the group was put together; its messages are above")
                if time.monotonic() > deadline:
                    raise EngineFailed(
                        f"rank {self.place.rank} waited {self.timeout_s:.0f} s for {key}; are all "
                        f"{self.place.size} ranks started?"
                    )
                time.sleep(_LOOK_S)
            value: bytes = self.store.get(key)
        except DistNetworkError as error:
            raise EngineFailed(f"rank {self.place.rank} lost the others while it waited for {key}") from error
        return value.decode()

    def agree(self, claims: Mapping[str, str]) -> None:
        """Compare what the ranks are about to run.

        Args:
            claims: by name of the setting to change where ranks differ.

        Raises:
            InvalidConfiguration: on every rank, naming the first that differs from rank 0, and in what.
            EngineFailed: a rank is missing.
        """
        self.say(f"claims/{self.place.rank}", json.dumps(claims))
        if self.place.rank == 0:
            self.say("verdict", json.dumps(self._first_difference(claims)))
        verdict = json.loads(self.hear("verdict"))
        if verdict is not None:
            raise InvalidConfiguration(*verdict)

    def _first_difference(self, claims: Mapping[str, str]) -> tuple[str, str] | None:
        for rank in range(1, self.place.size):
            theirs = json.loads(self.hear(f"claims/{rank}"))
            for name, value in claims.items():
                if theirs.get(name) != value:
                    return name, f"is {theirs.get(name)} on rank {rank} and {value} on rank 0; make them the same"
        return None
