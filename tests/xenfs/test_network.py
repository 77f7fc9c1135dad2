"""Goal: what is slow is done by one worker, in order, and its results are handed out only by reap(), each once, whatever
moment that is called at; a --bridge is understood; an interface has the name its place asks for.
Method: jobs that the test holds up; the worker stopped between its two steps. Nothing here changes the machine's network."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from netdev.link import Plug
from xenfs.config import GuestConfig
from xenfs.network import Bridge, Network, front_name

WAIT_S = 10.0


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


def readable(network: Network) -> bool:
    return bool(select.select([network.fd], [], [], 0)[0])


def drain(network: Network) -> None:
    while network.pending:
        network.wait(WAIT_S)
        assert network.reap(), f"nothing was done within {WAIT_S:g} s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("xenbr0", Bridge("xenbr0")),
        ("xenbr0=10.0.0.1/24", Bridge("xenbr0", ("10.0.0.1/24",))),
        ("br=10.0.0.1/24, fd00::1/64", Bridge("br", ("10.0.0.1/24", "fd00::1/64"))),
        ("br=", Bridge("br", ("",))),
        ("", Bridge("")),
        ("=1.2.3.4/8", Bridge("", ("1.2.3.4/8",))),
        ("a=b=c", Bridge("a", ("b=c",))),
        ("a=1.2.3.4/8,", Bridge("a", ("1.2.3.4/8", ""))),
    ],
)
def test_bridge(text, expected):
    """Goal: a name, and addresses after `=`; what makes no sense is for netlink to refuse.  Method: a table."""
    assert Bridge.parse(text) == expected


def test_names():
    """Goal: xn<handle> in a namespace of the guest's, xn<domid>.<handle> among others'.  Method: both."""
    config, plug = GuestConfig("", "g", "uuid"), Plug("", 7, 3, bytes(6), 1)
    assert front_name(config, plug) == "xn3"
    assert front_name(replace(config, netns="host"), plug) == "xn7.3"


def test_no_job_no_thread(network):
    """Goal: a host without vifs has no worker.  Method: threads after everything that may be called."""
    before = threading.active_count()
    network.wait(WAIT_S)
    assert not network.reap() and not readable(network) and threading.active_count() == before


def test_results(network):
    """Goal: results and exceptions arrive in order, in the thread that calls reap(), and not before; jobs run elsewhere.
    Method: five jobs, one of which raises."""
    seen: list[object] = []
    threads: set[int] = set()

    def job(number: int) -> object:
        threads.add(threading.get_ident())
        if number == 3:
            raise ValueError("three")
        return number

    for number in range(5):
        network.submit(lambda number=number: job(number), lambda result: seen.append((threading.get_ident(), result)))
    assert network.pending == 5 and seen == []
    drain(network)
    assert [str(result) for _, result in seen] == ["0", "1", "2", "three", "4"]
    assert isinstance(seen[3][1], ValueError)
    assert {thread for thread, _ in seen} == {threading.get_ident()} and len(threads) == 1
    assert threading.get_ident() not in threads
    assert not readable(network) and not network.reap()


def test_reap_while_a_job_runs(network):
    """Goal: reap() never waits.  Method: a job that is held up; reap() says no; then it is let go."""
    go, seen = threading.Event(), []
    network.submit(lambda: go.wait(WAIT_S), seen.append)
    assert not network.reap() and network.pending == 1
    go.set()
    drain(network)
    assert seen == [True]


def test_reap_between_the_workers_two_steps(network, monkeypatch):
    """Goal: a result that is there before the descriptor says so is no accident: reap() takes it when both are, and leaves
    the descriptor quiet.  Method: the worker is stopped before it writes to its eventfd."""
    write, reached, go, seen = os.eventfd_write, threading.Event(), threading.Event(), []

    def slow(fd: int, value: int) -> None:
        reached.set()
        go.wait(WAIT_S)
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", slow)
    network.submit(lambda: "result", seen.append)
    assert reached.wait(WAIT_S)
    assert not network.reap() and (seen, network.pending) == ([], 1)
    go.set()
    drain(network)
    assert seen == ["result"] and not readable(network)


def test_a_job_from_a_result(network):
    """Goal: what a result causes may be another job.  Method: a chain of three."""
    seen: list[object] = []

    def then(result: object) -> None:
        seen.append(result)
        if len(seen) < 3:
            network.submit(lambda: len(seen), then)

    network.submit(lambda: 0, then)
    drain(network)
    assert seen == [0, 1, 2]


def test_many(network):
    """Goal: none is lost and none is handed out twice, however they coincide.  Method: 3000 jobs, reaped all the while."""
    seen: list[object] = []
    for number in range(3000):
        network.submit(lambda number=number: number, seen.append)
        network.reap()
    drain(network)
    assert seen == list(range(3000)) and not readable(network)


def test_close_finishes_what_was_asked(network):
    """Goal: close() lets jobs end, and their results go nowhere.  Method: a slow job is under way."""
    ended, seen = [], []
    network.submit(lambda: (threading.Event().wait(0.1), ended.append(True)), seen.append)
    network.close()
    assert (ended, seen) == ([True], [])
    with pytest.raises(OSError):
        os.fstat(network.fd)
    network.fd = os.eventfd(0)  # for the fixture
    network._thread = None
