"""A pool of workers: every job once, few handed out ahead, and a process that is killed is an error of ours."""

import os
import signal
import time
from itertools import chain

import pytest

from vtp.processes import WorkerDied, WorkerPool


def begin():
    os.environ["BEGUN"] = "yes"


def double(number):
    assert os.environ["BEGUN"] == "yes"
    return 2 * number


def be_killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [0, 2])
def test_every_job_is_done_once(processes):
    with WorkerPool(processes, begin) as workers:
        results = list(chain.from_iterable(workers.results(double, range(30))))
    assert sorted(results) == [(number, 2 * number) for number in range(30)]


def test_jobs_are_taken_as_there_is_room():
    taken = []

    def jobs():
        for number in range(1000):
            taken.append(number)
            yield number

    with WorkerPool(0, begin) as workers:
        done = 0
        for ended in workers.results(double, jobs()):
            done += len(ended)
            assert len(taken) <= done + 2
            if done >= 10:
                break


def test_no_more_jobs_are_taken_than_asked_for():
    taken = iter(range(9))
    with WorkerPool(4, begin) as workers:
        results = workers.results(double, taken, most=2)
        next(results)
        assert next(taken) == 2
        results.close()


def test_slow_jobs_leave_time_to_answer():
    """Whoever waits for results can look at other things meanwhile."""
    with WorkerPool(0, begin) as workers:
        answers = list(workers.results(time.sleep, [0.7]))
    assert len(answers) >= 3
    assert answers[-1] == [(0.7, None)]


def test_a_killed_process_is_an_error():
    with (
        WorkerPool(1, begin) as workers,
        pytest.raises(WorkerDied, match="was killed, most likely because memory ran out: set VTP_PROCESSES lower"),
    ):
        list(workers.results(be_killed, [1, 2]))
