"""The thread that answers jobs: rounds, what follows a round's storing, and timers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from embedq.core.errors import ServerUnavailable
from embedq.workers.jobs.answer_thread import AnswersThread
from tests.checkpoints import PATIENCE_S


class Rounds:
    """A thread whose rounds are noted: "begin", what ran, "stored" or "not stored"."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        #: Whether the results of a round can be stored.
        self.can_store = True
        self.answers = AnswersThread(self._batch)

    @contextmanager
    def _batch(self) -> Iterator[None]:
        self.steps.append("begin")
        yield
        self.steps.append("stored" if self.can_store else "not stored")
        if not self.can_store:
            raise ServerUnavailable("the server is away")

    def note(self, step: str) -> Callable[[], None]:
        return partial(self.steps.append, step)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted within the block is one round of its own."""
        is_in, may_go = threading.Event(), threading.Event()

        def hold() -> None:
            is_in.set()
            may_go.wait(PATIENCE_S)

        self.answers.submit(hold)
        assert is_in.wait(PATIENCE_S)
        self.steps.clear()
        yield
        may_go.set()

    def settle(self) -> None:
        """Wait until all that was submitted has run, and the round that it ran in is over."""
        for _ in range(2):  # the second is in a later round
            done = threading.Event()
            self.answers.submit(done.set)
            assert done.wait(PATIENCE_S)


@pytest.fixture
def rounds() -> Iterator[Rounds]:
    made = Rounds()
    yield made
    made.answers.close()


def test_what_is_submitted_meanwhile_is_one_round_in_order(rounds: Rounds) -> None:
    with rounds.together():
        for name in "abc":
            rounds.answers.submit(rounds.note(name))
    rounds.settle()
    assert rounds.steps[:6] == ["stored", "begin", "a", "b", "c", "stored"]


def test_a_round_is_bounded(rounds: Rounds) -> None:
    with rounds.together():
        for _ in range(600):
            rounds.answers.submit(rounds.note("one"))
    rounds.settle()
    assert rounds.steps[:2] == ["stored", "begin"]
    assert rounds.steps.index("stored", 2) - 2 == 512


@pytest.mark.parametrize("can_store", [True, False])
def test_what_follows_a_round_follows_its_storing(rounds: Rounds, can_store: bool) -> None:
    with rounds.together():
        rounds.can_store = can_store
        for name in "ab":
            rounds.answers.submit(
                lambda name=name: rounds.answers.after_storing(rounds.note(f"ack {name}"), rounds.note(f"back {name}"))  # type: ignore[misc]
            )
    rounds.settle()
    rounds.can_store = True
    told = ["ack a", "ack b"] if can_store else ["back a", "back b"]
    first = rounds.steps.index("begin")
    assert rounds.steps[first : first + 4] == ["begin", "stored" if can_store else "not stored", *told]
    rounds.settle()
    assert rounds.steps.count(told[0]) == 1, "a later round repeats nothing"


def fail() -> None:
    raise ZeroDivisionError


def test_an_action_that_raises_keeps_no_other_from_running(rounds: Rounds) -> None:
    with rounds.together():
        rounds.answers.submit(fail)
        rounds.answers.submit(lambda: rounds.answers.after_storing(fail, rounds.note("never")))
        rounds.answers.submit(lambda: rounds.answers.after_storing(rounds.note("ack"), rounds.note("never")))
    rounds.settle()
    assert "ack" in rounds.steps
    assert "never" not in rounds.steps


def test_timers_run_when_they_are_due_the_earliest_first_and_not_if_cancelled(rounds: Rounds) -> None:
    due = threading.Event()

    def arm() -> None:
        rounds.answers.run_later(0.10, due.set)
        rounds.answers.run_later(0.08, rounds.note("later"))
        rounds.answers.run_later(0.02, rounds.note("sooner"))
        rounds.answers.run_later(0.03, rounds.note("cancelled")).cancel()

    begun_s = time.monotonic()
    rounds.answers.submit(arm)
    assert due.wait(PATIENCE_S)
    assert time.monotonic() - begun_s >= 0.1
    steps = [step for step in rounds.steps if step in ("later", "sooner", "cancelled")]
    assert steps == ["sooner", "later"]


@pytest.mark.parametrize("seconds", [1e10, 2.0**63 - 1])
def test_a_timer_of_any_length_keeps_no_action_from_running(rounds: Rounds, seconds: float) -> None:
    def arm() -> None:
        rounds.answers.run_later(seconds, rounds.note("never"))

    rounds.answers.submit(arm)
    rounds.settle()
    assert rounds.answers.is_alive
    assert "never" not in rounds.steps


def test_cancelled_timers_of_an_hour_are_not_kept_for_an_hour(rounds: Rounds) -> None:
    kept: list[int] = []

    def arm() -> None:
        for _ in range(5_000):
            rounds.answers.run_later(3600, rounds.note("never")).cancel()

    rounds.answers.submit(arm)
    rounds.settle()
    rounds.answers.submit(lambda: kept.append(len(rounds.answers._timers)))
    rounds.settle()
    assert kept[0] <= 2_000


def test_closing_runs_what_was_submitted(rounds: Rounds) -> None:
    other = Rounds()
    with other.together():
        other.answers.submit(other.note("last"))
    other.answers.close()
    assert "last" in other.steps
