"""A starter of a dataset that is gone at once: `python -m tests.chaos.start_dataset SOURCE TARGET ROWS_PER_PART`.

`python -m tests.chaos.start_dataset load TARGET STORE` is a loader, to be killed while it loads.
"""

from __future__ import annotations

import os
import sys

from embedq import tasks
from tests.chaos.light_worker import ALIAS


def main(arguments: list[str]) -> None:
    if arguments[0] == "load":
        from embedq.tasks.datasets.loading import load

        load(tasks.datasets.open(arguments[1]), arguments[2], "id", has_index=False)
    else:
        source, target, rows = arguments
        tasks.datasets.embed(source, target, text="body", keep=["id"], model=ALIAS, rows_per_part=int(rows))
    print("started", flush=True)
    os._exit(0)  # as a laptop that is closed


if __name__ == "__main__":
    main(sys.argv[1:])
