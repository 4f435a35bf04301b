"""For the tests of an application: embedq's jobs without a model, without a server, or with a real worker.

    from embedq import testing

    with testing.fake(dimensions=384): ...       # jobs answer at once, with vectors that follow from the texts
    with testing.in_process(): ...               # jobs are computed by a real model in this process
    with testing.worker() as worker: ...         # a server and a worker of the test's own; jobs are sent to them

With pytest, `pytest_plugins = ["embedq.testing"]` in the root's `conftest.py` makes fixtures of them: `embedq_fake`,
`embedq_in_process`, `embedq_worker` and `embedq_models` (`embedq.testing.fixtures`). Nothing is registered without that line:
an installed package that adds itself to every run costs those that do not use it. This module imports no test framework,
and nothing that a producer has not.
"""

from __future__ import annotations

from embedq.testing.computing_here import fake, in_process
from embedq.testing.fake_engine import FakeEngine
from embedq.testing.real_worker import Worker, worker

__all__ = ["FakeEngine", "Worker", "fake", "in_process", "pytest_plugins", "worker"]

#: pytest loads the plugins that a plugin names.
pytest_plugins = ["embedq.testing.fixtures"]
