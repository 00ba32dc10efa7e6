"""The side of an engine that runs in a peer's own environment: requests come as lines on stdin, answers go to stdout.

A request is a JSON object with `prompts` (lists of token ids) and `new_tokens`; the answer is the list of new token ids
of each prompt. The first line out is a JSON object that says what was loaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(load: Callable[[str, str, int, str], tuple[Generate, dict[str, object]]]) -> None:
    """Load, then answer until stdin ends. Arguments: checkpoint, folder for converted files, threads, precision."""
    checkpoint, converted, threads, precision = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the lines
    generate, about = load(checkpoint, converted, int(threads), precision)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(generate(request["prompts"], request["new_tokens"])), file=answers, flush=True)
