"""Silences what torch and transformers print while a model loads, and restores the host's own choices afterwards.

Log levels, progress bars and warning filters belong to the whole process. One load at a time changes them, so that of
loads in several threads none restores the choice of another.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def without_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore Python warnings of `category` inside."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hide transformers' progress bar, its warnings and its load report inside.

    The report lists weights that are dropped on purpose (an unused pooler); `core.models.weights` checks those that
    matter.
    """
    from transformers.utils import logging

    with without_warnings():
        level, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if has_progress_bar:
                logging.enable_progress_bar()
