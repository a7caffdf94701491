"""Wait for the processes of a job: pass signals on, end all when one fails, and return the exit code."""

import contextlib
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

from sft.launch.nodes import Nodes, Problem
from sft.launch.plan import GRACE_SECONDS, read_number
from sft.launch.processes import STOPPED
from sft.launch.workers import Child, print_line

POLL_SECONDS = 0.05
ARGUMENT_ERROR = 2  # exit code of train.py after a mistake in the arguments, which it has printed itself


def supervise_children(
    children: list[Child], signals: deque, nodes: Nodes | None = None, *, errors: str | None = None
) -> int:
    """Wait for all children and return the exit code of the job.

    A signal gives GRACE seconds to save a checkpoint; a failure gives the others EXIT_SECONDS. `errors` is the folder
    in which ranks leave an error that they didn't print.
    """
    grace = read_number(os.environ, "GRACE", GRACE_SECONDS)
    passed_on = set()
    failed = []
    problem = None
    deadline = None
    while running := [child for child in children if child.code is None]:
        time.sleep(POLL_SECONDS)
        ended = [child for child in running if child.has_ended()]
        if any(child.code == STOPPED for child in ended) or signals:
            deadline = deadline or time.monotonic() + grace
        while signals:
            passed_on.add(signals[0])
            _pass_on(running, signals.popleft())
        # A killed process comes first: the others' errors follow from that.
        failed += sorted((c for c in ended if not _is_in_order(c.code, passed_on)), key=lambda c: c.code)
        elsewhere = nodes.find_problem() if nodes else None
        if problem is None and (problem := _find_problem(failed) or elsewhere):
            deadline = time.monotonic() + problem.seconds
            if not failed:
                print_line(problem.text)
            elif nodes:
                nodes.failure = f"{problem.code} machine {nodes.job.node}: {problem.text}"
        if deadline and time.monotonic() > deadline:
            _kill_children(children)
    if {child.code for child in children} != {ARGUMENT_ERROR}:
        for child in failed:
            if errors and (words := Path(errors, child.name)).is_file():
                print(words.read_text(encoding="utf-8"), file=sys.stderr, flush=True)
            print_line(child.ending())
    return problem.code if problem else max((_exit_code(c.code) for c in children), key=lambda c: (c == STOPPED, c))


def _is_in_order(code: int, passed_on: set[int]) -> bool:
    return code in (0, STOPPED) or _exit_code(code) - 128 in passed_on


def _exit_code(code: int) -> int:
    """As a shell counts: 128 + the signal that killed it."""
    return 128 - code if code < 0 else code


def _find_problem(failed: list[Child]) -> Problem | None:
    return Problem(_exit_code(failed[0].code), failed[0].ending()) if failed else None


def _pass_on(running: list[Child], number: int) -> None:
    print_line(f"passing {signal.Signals(number).name} on to {', '.join(child.name for child in running)}")
    for child in running:
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            child.send(number)


def _kill_children(children: list[Child]) -> None:
    for child in [child for child in children if child.code is None]:
        print_line(f"{child.name} did not end; killed")
        child.kill()
        child.code = child.process.wait()
