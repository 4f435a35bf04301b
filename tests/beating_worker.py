"""A process that says of itself what a test wants, as a worker tells its launcher; it has no model and no server.

`python -m tests.beating_worker` tells the beats in BEATS (JSON, a list of their fields), the last one again and again;
turns of the event loop are added where a test states none.
BEATING_EXIT makes it end with that code instead of going on; BEATING_STAYS lets it ignore SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time

from embedq.workers.heartbeat_line import VARIABLE, Beat

#: Seconds between two beats.
INTERVAL_S = 0.02


def main() -> None:
    if os.environ.get("BEATING_STAYS"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    beats, num_turns = [Beat(**fields) for fields in json.loads(os.environ["BEATS"])], 0
    while True:
        for beat in beats:
            num_turns += 1
            told = beat if beat.num_turns else dataclasses.replace(beat, num_turns=num_turns)
            os.write(int(os.environ[VARIABLE]), told.line())
            time.sleep(INTERVAL_S)
        beats = beats[-1:]
        if code := os.environ.get("BEATING_EXIT"):
            sys.exit(int(code))


if __name__ == "__main__":
    main()
