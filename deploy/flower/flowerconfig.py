"""Flower's settings for embedq, read by Flower itself; options on its command line win.

    celery -A tasks flower --conf=deploy/flower/flowerconfig.py --port=5555

It never sees a text or a vector: tasks carry a summary of their arguments ("128 texts, 14,202
characters"), and a result's repr is its shape ("128 × 384 float32").
"""

# Nobody else on the network, unless a proxy that asks for a password is put before it.
address = "127.0.0.1"

# Every user of this machine reaches its loopback: they may look, not shut workers down.
read_only = True

# Two kilobytes or so each; Flower's own 100,000 would be hundreds of megabytes after a bulk load.
max_tasks = 10_000

# What a person asks first: what was it, how big, did it work, how long did it take, on which device.
# The rest is to the right, where a narrow window hides it.
tasks_columns = "name,state,args,kwargs,result,runtime,worker,received,started,uuid"

# Seconds after which a worker that is gone leaves the list: hosts come and go with the backlog.
purge_offline_workers = 3600
