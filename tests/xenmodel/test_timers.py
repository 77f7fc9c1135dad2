"""Goal: what is due is done once, at its time and in order, whatever the actions add meanwhile.
Method: a clock that the test sets; tables, and random schedules against a sorted list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenmodel.timers import Timers


class Schedule:
    """Timers on a clock that stands still unless it is set; `done` has the names of what ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers = Timers(lambda: self.now)
        self.done: list[str] = []

    def add(self, when: float, name: str) -> None:
        self.timers.add(when, lambda: self.done.append(name))

    def run_at(self, now: float) -> list[str]:
        self.now = now
        self.done.clear()
        self.timers.run()
        return list(self.done)


def test_nothing_is_due_without_timers() -> None:
    """Goal: an idle host sleeps for ever.  Method: no timers; then one, done."""
    schedule = Schedule()
    assert schedule.timers.next is None
    assert schedule.run_at(5) == []
    schedule.add(5, "a")
    assert schedule.timers.next == 5
    assert schedule.run_at(5) == ["a"]
    assert schedule.timers.next is None


def test_what_is_due_is_done_in_order_and_once() -> None:
    """Goal: by time, and of the same time first come, first served.  Method: added out of order; time goes in steps."""
    schedule = Schedule()
    for when, name in ((3, "c"), (1, "a"), (2, "b1"), (2, "b2"), (9, "d"), (2, "b3")):
        schedule.add(when, name)
    assert schedule.run_at(0.5) == [] and schedule.timers.next == 1
    assert schedule.run_at(2) == ["a", "b1", "b2", "b3"] and schedule.timers.next == 3
    assert schedule.run_at(2) == []
    assert schedule.run_at(100) == ["c", "d"] and schedule.timers.next is None


def test_the_past_is_due_at_once() -> None:
    """Goal: a time that is over is no error.  Method: add it after the clock has passed it."""
    schedule = Schedule()
    assert schedule.run_at(10) == []
    schedule.add(3, "late")
    assert schedule.timers.next == 3
    assert schedule.run_at(10) == ["late"]


def test_on_earlier_is_called_for_a_new_first_only() -> None:
    """Goal: who sleeps until `next` is woken when that moves forward, and only then.  Method: count the calls."""
    schedule, calls = Schedule(), []
    schedule.timers.on_earlier = lambda: calls.append(schedule.timers.next)
    for when in (5, 7, 5, 3, 4, 1):
        schedule.add(when, "")
    assert calls == [5, 3, 1]
    schedule.run_at(3)
    schedule.add(4, "")
    assert calls == [5, 3, 1], "another one is due at 4 already"


def test_an_action_that_comes_again_does_not_hold_the_loop() -> None:
    """Goal: run() ends, whatever actions add.  Method: one adds itself for now, one for the past, one for later."""
    schedule = Schedule()

    def again(delay: float, name: str) -> None:
        schedule.done.append(name)
        schedule.timers.add(schedule.now + delay, lambda: again(delay, name))

    for delay, name in ((0.0, "now"), (2.0, "later")):
        schedule.timers.add(1.0, lambda delay=delay, name=name: again(delay, name))  # type: ignore[misc]
    assert schedule.run_at(1) == ["now", "later"]
    assert schedule.timers.next == 1
    assert schedule.run_at(1) == ["now"]
    assert schedule.run_at(3) == ["now", "later"]


def test_an_action_that_raises_is_done_and_the_others_are_not_lost() -> None:
    """Goal: our mistake in one action costs no other.  Method: the first of two raises; run again."""
    schedule = Schedule()

    def fails() -> None:
        raise ZeroDivisionError

    schedule.timers.add(1, fails)
    schedule.add(1, "other")
    try:
        schedule.run_at(1)
    except ZeroDivisionError:
        schedule.done.append("raised")
    assert schedule.done == ["raised"]
    assert schedule.run_at(1) == ["other"]


def test_what_an_action_adds_for_the_past_puts_off_nothing_else() -> None:
    """Goal: what is due by now is done now.  Method: the first of two that are due adds a third, due between them."""
    schedule = Schedule()
    schedule.timers.add(1, lambda: schedule.add(2, "added"))
    schedule.add(5, "due")
    assert schedule.run_at(10) == ["due"]
    assert schedule.run_at(10) == ["added"]


@given(steps=st.lists(st.tuples(st.sampled_from(["add", "sleep"]), st.integers(0, 9)), max_size=60))
def test_any_schedule(steps: list[tuple[str, int]]) -> None:
    """Goal: the same, for any times.  Method: add for times before and after now, let time pass; the oracle is a stable
    sort of what waits."""
    schedule = Schedule()
    waiting: list[tuple[float, str]] = []
    for number, (step, amount) in enumerate(steps):
        if step == "add":
            when, name = schedule.now + amount - 2, str(number)
            schedule.add(when, name)
            waiting.append((when, name))
        else:
            now = schedule.now + amount
            waiting.sort(key=lambda each: each[0])
            assert schedule.run_at(now) == [name for when, name in waiting if when <= now]
            waiting = [(when, name) for when, name in waiting if when > now]
        assert schedule.timers.next == min((when for when, _ in waiting), default=None)
