"""Exit codes of workers and launchers, by which a service manager decides whether to start one again."""

#: Exit code for what a restart cannot cure: a wrong setting, a model that cannot load.
EXIT_CANNOT_START = 1

#: Exit code of a worker whose device hangs or fails everything: it is started again, its jobs go to others.
EXIT_DEVICE_DEAD = 3

#: Exit code of a worker that ended with an error nobody expected, before it took jobs or in its event loop, and of a
#: launcher whose workers hang while they load: a restart may cure that. Python's own code for it is 1, and so is Celery's.
EXIT_BROKEN = 4
