"""The bare forward pass of one text, in a process of its own: no queue, no worker, no thread but this one.

Comes in on standard input as JSON: text, num_calls, and what `core.load` takes. Goes out on
standard output as JSON: forward_s and encode_s, a list of seconds each.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from embedq import core
from embedq.core.options import EmbedOptions
from embedq.core.sequence import Sequence

#: Calls that do not count.
_NUM_FIRST = 20


def measure(text: str, num_calls: int, **load: Any) -> dict[str, list[float]]:
    """Seconds of each call's encoding and of its forward pass."""
    encode_s, forward_s = [], []
    with core.load(**load) as engine:
        engine.warm_up()
        (model,) = engine.models.values()
        options = EmbedOptions()
        for _ in range(_NUM_FIRST + num_calls):
            begin_s = time.perf_counter()
            (tokens,) = model.encode_texts([text], options)  # type: ignore[attr-defined]
            encoded_s = time.perf_counter()
            model.launch([Sequence(tokens)], model.wanted(options))()
            forward_s.append(time.perf_counter() - encoded_s)
            encode_s.append(encoded_s - begin_s)
    return {"encode_s": encode_s[_NUM_FIRST:], "forward_s": forward_s[_NUM_FIRST:]}


if __name__ == "__main__":
    json.dump(measure(**json.load(sys.stdin)), sys.stdout)
