"""Claims: one holder at a time, whoever races and whoever dies."""

import json
import multiprocessing
import os
import signal

import pytest

from bitfit_fast.study.claims import Claims

fork = multiprocessing.get_context("fork")


def take_all(folder, start, names, taken):
    claims = Claims(folder)
    start.wait()
    taken.put([name for name in names if claims.take(name)])
    start.wait()  # alive as long as the others still take


def race(folder, names, processes=2):
    start, taken = fork.Barrier(processes), fork.Queue()
    workers = [
        fork.Process(target=take_all, args=(folder, start, names, taken)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [taken.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    return found


def hold(folder, name, ready):
    Claims(folder).take(name)
    ready.set()
    signal.pause()


def dead_holder(folder, name):
    """Let a process take a claim, and kill it."""
    ready = fork.Event()
    process = fork.Process(target=hold, args=(folder, name, ready))
    process.start()
    assert ready.wait(60)
    assert Claims(folder).holder(name)
    assert not Claims(folder).take(name)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)


def test_two_processes_never_get_the_same_claim(tmp_path):
    names = [f"run-{i}" for i in range(200)]
    first, second = race(tmp_path / "claims", names)
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(names)
    assert not [p for p in (tmp_path / "claims").iterdir() if p.suffix != ".json"]


def test_the_claim_of_a_killed_process_goes_to_exactly_one_other(tmp_path):
    for name in ("a", "b", "c"):
        dead_holder(tmp_path, name)
    found = race(tmp_path, ["a", "b", "c"], processes=4)
    assert sorted(name for names in found for name in names) == ["a", "b", "c"]


def test_a_claim_is_given_up_by_its_holder_only(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    theirs.own = {**theirs.own, "pid": os.getppid(), "started": "0"}
    assert ours.take("a")
    theirs.release("a")
    assert ours.holder("a") == ours.own
    ours.release("a")
    assert ours.holder("a") is None


def test_a_claim_of_another_machine_goes_when_it_gives_no_sign_of_life(tmp_path):
    here, there = Claims(tmp_path), Claims(tmp_path)
    there.own = {**there.own, "host": "elsewhere"}
    assert there.take("a") and there.take("b")
    for name in "ab":
        os.utime(tmp_path / f"{name}.json", (0, 0))
    there.keep_up(["b", "gone"])
    assert not here.take("b")
    assert here.take("a")
    assert here.holder("a") == here.own


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the number was used again
        ({"pid": 2**22 + 1}, True),  # no such process
        ({"pid": 2**22 + 1, "host": "elsewhere"}, False),  # nothing is known of it
    ],
)
def test_only_a_dead_process_of_this_machine_loses_its_claim(tmp_path, change, stale):
    claims = Claims(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({**claims.own, **change}))
    assert claims.take("a") is stale
