"""Time to first token with a cold and a warm prefix cache: `python -m benchmarks.prefix [--json] [--quick]`.

A request with a long shared beginning and a short end of its own, against an engine that has never seen the beginning
and one that has. The same for `transformers`, which recomputes it.
"""

from __future__ import annotations

import random
import statistics
import time

import torch

from benchmarks.checkpoints import SIZES, random_checkpoint
from benchmarks.contestants import Penstock, Transformers
from benchmarks.report import parser, publish, table


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--device", default="cpu")
    options.add_argument("--shared", type=int, default=1024, help="tokens in common")
    arguments = options.parse_args()
    arguments.dtype, arguments.quantization, arguments.kv_dtype = "float32", None, "auto"
    if arguments.quick:
        arguments.size, arguments.runs = "tiny", 3
    torch.set_num_threads(arguments.threads)
    folder = random_checkpoint(arguments.size)
    ours, peer = Penstock(folder, arguments), Transformers(folder, arguments)
    shape = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [shape.randrange(2, 2000) for _ in range(length)]

    def first_token_ms(contestant: Penstock | Transformers, ids: list[int]) -> float:
        started = time.perf_counter()
        contestant.generate([ids], 1)
        return (time.perf_counter() - started) * 1e3

    first_token_ms(ours, prompt(arguments.shared))
    first_token_ms(peer, prompt(arguments.shared))
    cold, warm, recomputed = [], [], []
    for _ in range(max(3, arguments.runs)):
        shared = prompt(arguments.shared)
        cold.append(first_token_ms(ours, shared + prompt(32)))
        recomputed.append(first_token_ms(peer, shared + prompt(32)))
        warm.append(first_token_ms(ours, shared + prompt(32)))
    figures = {
        "cold_ms": statistics.median(cold),
        "warm_ms": statistics.median(warm),
        "transformers_ms": statistics.median(recomputed),
    }
    ratios = {name: figures[name] / figures["warm_ms"] for name in ("cold_ms", "transformers_ms")}
    table(
        f"time to first token, {arguments.size}, {arguments.shared} shared tokens + 32 own",
        ["", "ms", "times warm"],
        [
            ["penstock, cold", figures["cold_ms"], ratios["cold_ms"]],
            ["penstock, warm", figures["warm_ms"], 1.0],
            ["transformers", figures["transformers_ms"], ratios["transformers_ms"]],
        ],
    )
    publish(
        "prefix",
        {"size": arguments.size, "shared_tokens": arguments.shared, "figures": figures, "ratios": ratios},
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
