"""Worker processes: the results of one process, in its order; faults that name file and line; no process left."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from sft import workers
from sft.workers import TaskError, Workers, choose_num_workers


class Number(NamedTuple):
    """A task: a number, on a line of a file."""

    number: int
    size: int = 0

    @property
    def where(self) -> str:
        return f"data.json line {self.number}"


def times(factor: int, task: Number) -> tuple[int, int, bytes]:
    return factor * task.number, os.getpid(), bytes(task.size)


def fail(task: Number) -> int:
    if task.number == 7:
        raise RuntimeError("seven\nis bad")
    return task.number


def kill_own_process(task: Number) -> int:
    if task.number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.number


def refuse() -> None:
    raise OSError("no tokenizer here")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_in_order_from_as_many_processes_as_asked():
    with Workers(3, partial(partial, times, 2)) as started:
        found = list(started.map(map(Number, range(40))))
    assert [task.number for task, _result in found] == list(range(40))
    assert [result[0] for _task, result in found] == list(range(0, 80, 2))
    pids = {pid for _task, (_double, pid, _bytes) in found}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert not any(map(is_running, pids))


def test_one_process_is_this_one():
    with Workers(1, lambda: partial(times, 2)) as started:
        assert [result for _task, result in started.map([Number(4)])] == [(8, os.getpid(), b"")]


def test_a_task_before_which_nothing_was_taken_does_not_run_far_ahead():
    """A slow consumer: each worker may have AHEAD_PER_WORKER results waiting, here of 30 MB."""
    drawn = []

    def tasks():
        for number in range(20):
            drawn.append(number)
            yield Number(number, size=30_000_000 if number == 3 else 1000)

    with Workers(2, partial(partial, times, 1)) as started:
        results = started.map(tasks())
        next(results)
        assert len(drawn) == 2 * workers.AHEAD_PER_WORKER
        assert [len(content) for _task, (_number, _pid, content) in results][2] == 30_000_000


def test_a_second_map_runs_inside_the_first():
    with Workers(2, partial(partial, times, 1)) as started:
        found = []
        for task, _result in started.map(map(Number, range(10))):
            found.append(task.number)
            if task.number == 4:
                found += [inner.number for inner, _result in started.map(map(Number, range(100, 120)))]
    assert found == [*range(5), *range(100, 120), *range(5, 10)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_names_the_task(num_workers):
    with Workers(num_workers, partial(partial, fail)) as started, pytest.raises(TaskError) as caught:
        list(started.map(map(Number, range(40))))
    assert str(caught.value) == "data.json line 7: RuntimeError: seven is bad"


def test_a_killed_worker_names_the_task():
    with Workers(2, partial(partial, kill_own_process)) as started, pytest.raises(TaskError) as caught:
        list(started.map(map(Number, range(40))))
    expected = "data.json line 7: a worker was killed by SIGKILL while it read them, maybe for lack of memory; "
    assert str(caught.value) == expected + "try --preprocessing_num_workers 1"


def test_a_worker_that_can_not_start_its_function_says_why():
    with Workers(2, refuse) as started, pytest.raises(TaskError, match=r"line 0: OSError: no tokenizer here"):
        list(started.map([Number(0)]))


def test_a_worker_that_ends_before_it_reads_its_function_names_the_task(monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    ended = pytest.raises(TaskError, match=r"data\.json line 1: the worker that read it ended with code 1")
    with Workers(2, partial(partial, times, bytes(1 << 24))) as started, ended:
        list(started.map([Number(1)]))


def test_a_worker_ends_when_its_parent_closes_the_socket():
    """The kernel closes it however the parent ends."""
    with Workers(2, partial(partial, times, 1)) as started:
        list(started.map([Number(0)]))
        worker = started._processes.workers[0]
        worker.channel.close()
        assert started._processes.find_exit_code(worker) == 0


def test_workers_end_with_the_process_that_forked_them():
    with Workers(2, partial(partial, times, 1)) as started:
        pids = {pid for _task, (_number, pid, _bytes) in started.map(map(Number, range(4)))}
        started._processes._process.kill()
        with pytest.raises(TaskError, match=r"data\.json line \d: a worker was killed by SIGKILL"):
            list(started.map(map(Number, range(100_000))))
    assert len(pids) == 2
    while any(map(is_running, pids)):  # the kernel kills them
        pass


def test_signals_to_all_processes_are_left_to_the_parent():
    with Workers(2, partial(partial, times, 1)) as started:
        results = started.map(map(Number, range(20)))
        _task, (_number, pid, _bytes) = next(results)
        for number in workers.HANDLED_BY_PARENT:
            os.kill(pid, number)
        assert len(list(results)) == 19
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_little_data_stays_in_one_process(monkeypatch):
    monkeypatch.setattr(workers, "count_cores", lambda: 8)
    mib = 1 << 20
    assert [choose_num_workers(None, size * mib) for size in (0, 63, 64, 100, 10_000)] == [1, 1, 2, 3, 8]
    assert choose_num_workers(3, 0) == 3


def test_the_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(workers, "CGROUP_QUOTA", str(quota))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert workers.count_cores() == 64
    for text, cores in (("max 100000\n", 64), ("400000 100000\n", 4), ("50000 100000\n", 1)):
        quota.write_text(text)
        assert workers.count_cores() == cores


def test_this_process_does_the_tasks_until_the_workers_have_started():
    def tasks():
        number = 0
        while started._stand_in:
            yield Number(number)
            number += 1
        yield from map(Number, range(number, number + 20))

    with Workers(2, partial(partial, times, 2), partial(times, 2)) as started:
        found = list(started.map(tasks()))
    assert [task.number for task, _result in found] == list(range(len(found)))
    assert [result[0] for _task, result in found] == list(range(0, 2 * len(found), 2))
    pids = [pid for _task, (_double, pid, _bytes) in found]
    assert set(pids[:-21]) == {os.getpid()}
    assert os.getpid() not in pids[-20:]
