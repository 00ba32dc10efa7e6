"""The engine beside its peers on the same weights: `python -m benchmarks.engine [--size small] [--json] [--quick]`.

With `--device cuda` it is another benchmark, of serving many requests at once; see `benchmarks/cuda_engine.py`.

Four workloads: a prompt of 512 tokens (prefill), one stream of 128 new tokens (single), 32 requests of 64 new tokens
each (batch), and 16 requests sharing 512 tokens (prefix, cold and warm). Greedy, end of sequence ignored, fp32 unless
`--dtype` or `--quantization` say otherwise. Peers: `transformers` generate, and the engines that `make bench-peers`
has installed. Beside the rates stands what memory bandwidth allows one stream, measured here. Also: how many sequences
the paged cache holds in the bytes in which contiguous allocation holds one each.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.checkpoints import SIZES, random_checkpoint
from benchmarks.contestants import Contestant, Penstock, Transformers, installed_engines
from benchmarks.cuda_engine import measure as measure_on_gpu
from benchmarks.report import alternate, chart, console, parser, publish, table

LABELS = {
    "prefill_tok_s": "prompt, tok/s",
    "single_tok_s": "1 stream, tok/s",
    "batch32_tok_s": "32 streams, tok/s",
    "prefix_cold_s": "prefix cold, s",
    "prefix_warm_s": "prefix warm, s",
}
"""What a person reads in place of the report's keys."""


def main() -> None:
    """Run the comparison and print it."""
    options = parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--quantization", choices=["int8"], default=None)
    options.add_argument(
        "--kv-dtype", choices=["auto", "float16", "int8", "float8"], default="auto", help="our KV cache"
    )
    options.add_argument("--ablate", action="store_true", help="on a GPU, also without graphs and without overlap")
    options.add_argument("--peers", type=Path, default=Path(".bench-venvs"), help="folder of the peers' environments")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.size, arguments.runs = "tiny", 1
    if arguments.device.startswith("cuda"):
        measure_on_gpu(arguments)
        return
    if arguments.ablate:
        options.error("--ablate is about what only a GPU has; give --device cuda")
    torch.set_num_threads(arguments.threads)
    folder = random_checkpoint(arguments.size)
    ours = Penstock(folder, arguments)
    contestants: dict[str, Contestant] = {"penstock": ours}
    if arguments.quantization is None:  # transformers has no 8-bit products on CPU
        contestants["transformers"] = Transformers(folder, arguments)
    if arguments.device == "cpu" and arguments.dtype == "float32":
        contestants |= installed_engines(arguments.peers, folder, arguments)
    gc.collect()
    gc.freeze()  # as a worker does once it is ready: what was imported is not looked through again and again

    figures = alternate(
        {name: _workloads(contestant, quick=arguments.quick) for name, contestant in contestants.items()},
        arguments.runs,
        f"{arguments.size} {arguments.quantization or arguments.dtype}",
    )
    ratios = {
        name: {
            key: (ours_value / value if key.endswith("tok_s") else value / ours_value)
            for key, value in peer.items()
            if (ours_value := figures["penstock"][key])
        }
        for name, peer in figures.items()
        if name != "penstock"
    }
    best = {key: min(ratio[key] for ratio in ratios.values()) for key in LABELS} if ratios else {}
    rows = {**figures, **{f"ours against {name}": ratio for name, ratio in ratios.items()}}
    if len(ratios) > 1:
        rows["ours against the best"] = best
    pages = "" if arguments.kv_dtype == "auto" else f", our keys and values {arguments.kv_dtype}"
    table(
        f"{arguments.size}, {arguments.quantization or arguments.dtype}{pages}, {arguments.threads} threads",
        ["", *LABELS.values()],
        [[name, *(values[key] for key in LABELS)] for name, values in rows.items()],
    )
    for key, label in LABELS.items():
        chart(label, {name: values[key] for name, values in figures.items()})
    bandwidth = memory_bandwidth_bytes_per_s(quick=arguments.quick)
    bound = bandwidth / ours.weight_bytes
    console.print(
        f"memory gives {bandwidth / 1e9:.1f} GB/s: at most {bound:,.0f} tok/s for one stream; reached "
        f"{figures['penstock']['single_tok_s'] / bound:.0%}"
    )
    packing = cache_packing()
    console.print(
        f"in the bytes of {packing['contiguous']} contiguous sequences of {packing['max_len']} tokens the pages hold "
        f"{packing['paged']}: {packing['ratio']:.1f} times as many"
    )
    publish(
        "engine",
        {
            "size": arguments.size,
            "dtype": arguments.quantization or arguments.dtype,
            "kv_dtype": arguments.kv_dtype,
            "device": arguments.device,
            "threads": arguments.threads,
            "figures": figures,
            "ratios": ratios,
            "ratios_to_best": best,
            "bandwidth_gb_s": bandwidth / 1e9,
            "single_bound_tok_s": bound,
            "cache_packing": packing,
        },
        as_json=arguments.json,
    )


def _workloads(contestant: Contestant, *, quick: bool) -> Callable[[], Mapping[str, float]]:
    shape = random.Random(0)
    vocabulary = 2000
    scale = 4 if quick else 1

    def prompt(length: int) -> list[int]:
        return [shape.randrange(2, vocabulary) for _ in range(length)]

    def measure() -> Mapping[str, float]:
        long, first, single = prompt(512), prompt(128), prompt(128)  # none that a prefix cache has seen
        batch = [prompt(128) for _ in range(32)]
        shared = prompt(512)
        sharers = [shared + prompt(32) for _ in range(16)]
        again = [shared + prompt(32) for _ in range(16)]
        prefill_s = _timed(lambda: contestant.generate([long], 1))
        first_s = _timed(lambda: contestant.generate([first], 1))
        single_s = _timed(lambda: contestant.generate([single], 128 // scale + 1))
        batch_s = _timed(lambda: contestant.generate(batch, 64 // scale))
        cold_s = _timed(lambda: contestant.generate(sharers, 32 // scale))
        warm_s = _timed(lambda: contestant.generate(again, 32 // scale))
        return {
            "prefill_tok_s": len(long) / prefill_s,
            # After the first token; with it where a disturbance made one token take longer than many.
            "single_tok_s": (128 // scale) / (single_s - first_s if first_s < single_s else single_s),
            "batch32_tok_s": 32 * (64 // scale) / batch_s,
            "prefix_cold_s": cold_s,
            "prefix_warm_s": warm_s,
        }

    return measure


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_bandwidth_bytes_per_s(*, quick: bool) -> float:
    """Rate at which memory is read, by summing an array far larger than the caches: the best of several."""
    data = torch.ones((64 if quick else 256) * 2**20, dtype=torch.float32)
    return data.nbytes / min(_timed(data.sum) for _ in range(5))


def cache_packing(max_len: int = 2048, page_size: int = 16) -> dict[str, float]:
    """Sequences that fit equal bytes: pages, filled until the allocator has none left, and contiguous max-length rows.

    The mix of lengths is log-uniform from 32 to 1024 tokens.
    """
    from penstock_core.cache import PagedAttentionKVCache

    shape = random.Random(1)
    contiguous = 32
    cache = PagedAttentionKVCache(contiguous * max_len // page_size, page_size)
    paged = 0
    while (wanted := -(-int(2 ** shape.uniform(5, 10)) // page_size)) <= cache.num_available:
        cache.allocate(wanted)
        paged += 1
    return {"max_len": max_len, "contiguous": contiguous, "paged": paged, "ratio": paged / contiguous}


if __name__ == "__main__":
    main()
