"""Flower's settings for embedq, read by Flower itself; options on its command line win.

    embedq flower --port=5555

It never sees a text or a vector: tasks carry a summary of their arguments ("128 texts, 14,202
characters"), and a result's repr is its shape ("128 × 384 float32").
"""

import os
import secrets
import sys

# Whoever reads "none" there wants no password: the demo, and whoever puts a proxy that asks before it. Otherwise it is
# asked for, and made up where nobody gave one: tasks' summaries and workers' names are not for everybody.
_given = os.environ.get("FLOWER_BASIC_AUTH", "")
if _given == "none":
    basic_auth: list[str] = []
elif not _given and not any(word.replace("-", "_").startswith("__basic_auth") for word in sys.argv):
    basic_auth = [f"embedq:{secrets.token_urlsafe(12)}"]
    print(
        f"Flower asks for {basic_auth[0]}; set FLOWER_BASIC_AUTH=user:password to choose", file=sys.stderr, flush=True
    )

# Nobody else on the network, unless a proxy that asks for a password is put before it.
address = "127.0.0.1"

# Every user of this machine reaches its loopback: they may look, not shut workers down.
read_only = True

# Five kilobytes each. After 50,000 jobs Flower has 134 MiB and stays there; with Flower's own 100,000 tasks it would be
# half a gigabyte (`python -m tests.bench flower`, docs/measurements.md).
max_tasks = 10_000

# What a person asks first: what was it, how big, did it work, how long did it take, on which device.
# The rest is to the right, where a narrow window hides it.
tasks_columns = "name,state,args,kwargs,result,runtime,worker,received,started,uuid"

# Seconds after which a worker that is gone leaves the list: hosts come and go with the backlog.
purge_offline_workers = 3600
