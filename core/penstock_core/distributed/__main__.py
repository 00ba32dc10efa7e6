"""`python -m penstock_core.distributed`: a follower that rank 0 started.

What to do comes as one line of JSON on standard input, whose end is rank 0's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from penstock_core.cache import PageConfig
from penstock_core.distributed.config import DistributedConfig
from penstock_core.distributed.engine import DistributedInferenceEngine, EngineConfig
from penstock_core.distributed.followers import follow
from penstock_core.distributed.rendezvous import Place, Rendezvous
from penstock_core.protocol.errors import PenstockError


def main() -> int:
    """Load this rank's part, follow, and return the exit code."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    values = order["config"]
    config = EngineConfig(
        **{**values, "page": PageConfig(**values["page"]), "distributed": DistributedConfig(**values["distributed"])}
    )
    rank, size = int(order["rank"]), int(order["size"])
    try:
        rendezvous = Rendezvous.in_file(
            Path(order["rendezvous"]), Place(rank, size, rank, size), config.distributed.timeout_s
        )
        follow(DistributedInferenceEngine.load_rank(config, rendezvous))
    except (PenstockError, RuntimeError) as error:
        sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
        return 1
    return 0


def _end_with_rank_0() -> None:
    # Not through sys.stdin: a thread that is inside its buffer when the interpreter ends makes that a fatal error.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
