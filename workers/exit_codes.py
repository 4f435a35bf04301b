"""Exit codes of workers and launchers: a service manager decides by them whether to restart one."""

#: A restart will not help: a setting is wrong, or a model cannot load.
EXIT_CANNOT_START = 1

#: The worker's device hangs or fails every batch: the launcher restarts the worker, its jobs go to other workers.
EXIT_DEVICE_DEAD = 3

#: A restart may help: the worker ended with an unexpected error, or a launcher's workers hang while they load. Python
#: and Celery themselves end with 1 then.
EXIT_BROKEN = 4
