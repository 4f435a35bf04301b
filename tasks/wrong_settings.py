"""Ends a command in one line where the settings that are read as `embedq.tasks` is imported are wrong.

A program that imports it gets InvalidSettings, and `embedq` shows that in a line. But Python imports a package before it
runs a module of it, and Celery before it runs a command for an application: nobody could catch the error there, and its
line would stand below a traceback.
"""

from __future__ import annotations

import sys
from pathlib import PurePath

from embedq.core.errors import InvalidSettings

#: The module by which `python -m celery` runs, the program of that name, and the application that it must be run for: another
#: one that imports us may do without.
_CELERY_MODULE, _CELERY, _APPLICATION = "celery.__main__", "celery", "embedq.tasks"

#: Modules of ours that are run, except the one that catches the error itself.
_OURS, _CATCHES = "embedq.", "embedq.__main__"


def end_command(error: InvalidSettings) -> None:
    """End the process with code 1 and one line if it is a command of ours, or of Celery's for our application.

    In any other program it returns.
    """
    if program := _command():
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        # Celery's command line catches every Exception, and prints its traceback.
        raise SystemExit(1)


def _command() -> str | None:
    """The command that this process is, as it was typed; None for any other program."""
    module = _module()
    program = PurePath(sys.argv[0]).name if sys.argv else ""  # within another program Python may have none
    is_celery = module == _CELERY_MODULE or (module is None and program == _CELERY)
    if is_celery and any(_APPLICATION in word for word in sys.argv):
        return _CELERY
    if module and module.startswith(_OURS) and module != _CATCHES:
        return f"python -m {module.removesuffix('.__main__')}"
    return None


def _module() -> str | None:
    """The module that `python -m` runs, or is about to run; None without."""
    if sys.argv[:1] == ["-m"]:  # Python looks for the module, and imports its package
        return sys.orig_argv[-len(sys.argv)]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else None
