"""The launcher: signals, exit codes, and no process outlives it. Real processes, no model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.launch.launcher import main
from sft.launch.processes import LOST, STOPPED
from sft.launch.workers import bind_port
from tests.conftest import ROOT


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_starts_no_process(arguments, code, capsys):
    assert main(arguments) == code
    assert capsys.readouterr().out.startswith("usage: python -m sft.launch SCRIPT [ARGUMENTS ...] ")


WORKER = """
import os, signal, sys, time
rank, mode = int(os.environ["RANK"]), sys.argv[1]
if mode == "stop":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: (time.sleep(rank), os.write(1, b"saved\\n"), sys.exit(75)))
if mode == "deaf":
    signal.signal(signal.SIGTERM, lambda *_: None)
words = ("pid", os.getpid(), rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"])
os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # a line at a time, whatever the others write
if mode == "mistake":
    sys.exit(2)
if mode == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "die":
    time.sleep(1)
    sys.exit(76)
while True:
    time.sleep(0.1)
"""


class Run:
    """A launcher under way, the process numbers of its workers, and later its exit code and what it said."""

    def __init__(self, tmp_path: Path, mode: str, num_workers: int = 2, **environment: str):
        (tmp_path / "worker.py").write_text(WORKER)
        command = [sys.executable, "-m", "sft.launch", str(tmp_path / "worker.py"), mode]
        settings = {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1", **environment}
        names = ("HOSTFILE", "NNODES", "MASTER_ADDR", "MASTER_PORT", "SLURM_NNODES", "NUM_GPUS")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines = [self.process.stdout.readline().split() for _ in range(num_workers)]
        self.workers, self.places = [int(line[1]) for line in lines], sorted(line[2:] for line in lines)

    def end(self) -> tuple[int, str]:
        self.out, self.err = self.process.communicate(timeout=60)
        return self.process.returncode, self.err

    def living(self) -> list[int]:
        """Workers that still run; a process that was killed may need a moment."""
        until = time.monotonic() + 60
        while (alive := [pid for pid in self.workers if _runs(pid)]) and time.monotonic() < until:
            time.sleep(0.05)
        return alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_reaches_every_worker_and_their_exit_code_comes_back(tmp_path, name):
    run = Run(tmp_path, "stop")
    assert run.places == [["0", "2", "0"], ["1", "2", "1"]]
    run.process.send_signal(getattr(signal, name))
    assert run.end() == (STOPPED, f"launch: passing {name} on to rank 0, rank 1\n")
    assert run.out == "saved\nsaved\n"
    assert run.living() == []


FAILING = """
import os, time
from sft.train.arguments import fail

if os.environ["RANK"] == "1":
    fail(["no tokenizer here", "no base here"])
time.sleep(1)
"""


@pytest.mark.slow
def test_an_error_that_only_a_later_rank_has_is_printed(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "sft.launch", str(tmp_path / "failing.py")]
    settings = os.environ | {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 2
    expected = ["train.py: rank 1: no tokenizer here", "train.py: rank 1: no base here"]
    assert done.stderr.splitlines()[-3:] == [*expected, "launch: rank 1 ended with exit code 2"]


@pytest.mark.slow
def test_one_rank_that_exits_cleanly_leaves_the_others_time_to_do_so(tmp_path):
    run = Run(tmp_path, "stop")
    os.kill(run.workers[0], signal.SIGTERM)
    time.sleep(1)
    assert run.process.poll() is None
    os.kill(run.workers[1], signal.SIGUSR1)
    assert run.end() == (STOPPED, "")


@pytest.mark.slow
def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path):
    run = Run(tmp_path, "stop")
    run.process.kill()
    assert run.end() == (-signal.SIGKILL, "")
    assert run.living() == []


@pytest.mark.slow
def test_workers_that_ignore_a_signal_are_killed_after_the_grace(tmp_path):
    run = Run(tmp_path, "deaf", GRACE="1")
    run.process.terminate()
    code, said = run.end()
    assert code == 128 + signal.SIGKILL
    assert said.endswith("launch: rank 0 did not end; killed\nlaunch: rank 1 did not end; killed\n")
    assert run.living() == []


@pytest.mark.slow
def test_the_rank_that_died_is_named_and_gives_the_exit_code(tmp_path):
    run = Run(tmp_path, "die")
    said = "launch: rank 1 was killed by SIGKILL\nlaunch: rank 0 ended with exit code 76\n"
    assert run.end() == (128 + signal.SIGKILL, said)


@pytest.mark.slow
def test_a_mistake_in_the_arguments_is_left_to_train_py_to_say(tmp_path):
    assert Run(tmp_path, "mistake").end() == (2, "")


@pytest.mark.slow
def test_a_port_in_use_is_one_line(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "sft.launch", "worker.py"]
        settings = {**os.environ, "NUM_PROCESSES": "2", "MASTER_PORT": str(port)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    said = f"ds_all.sh: MASTER_PORT={port}: Address already in use; choose another, or leave it out on one machine\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.fixture
def two_machines(tmp_path) -> dict[str, str]:
    """A hostfile of two machines, and an ssh that runs here what it is given."""
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=2\n")
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nshift\nsh -c "$*"\n')
    ssh.chmod(0o755)
    settings = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1", "MODEL": "m", "NUM_PROCESSES": ""}
    return {**settings, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


@pytest.mark.slow
def test_a_hostfile_starts_every_machine_and_a_signal_reaches_all_of_them(tmp_path, two_machines):
    run = Run(tmp_path, "stop", 3, **two_machines)
    assert run.places == [["0", "3", "0"], ["1", "3", "0"], ["2", "3", "1"]]
    run.process.terminate()
    code, said = run.end()
    assert code == STOPPED
    assert "launch: passing SIGTERM on to machine one, machine two\n" in said
    assert run.out == "saved\n" * 3


@pytest.mark.slow
def test_no_machine_keeps_running_when_the_one_that_started_it_is_killed(tmp_path, two_machines):
    run = Run(tmp_path, "deaf", 3, **two_machines)
    run.process.kill()
    assert run.living() == []


@pytest.mark.slow
def test_machines_that_start_by_themselves_end_together(tmp_path):
    """The first is killed; the other notices that no launcher holds the store, or has connected to it."""
    with bind_port(0) as free:
        port = free.getsockname()[1]
    knobs = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "MODEL": "m", "OUTPUT": "o"}
    first, second = (Run(tmp_path, "stop", 1, **knobs, NODE_RANK=rank, NODE_TIMEOUT="5") for rank in "01")
    first.process.kill()
    first.end()
    code, said = second.end()
    assert code == LOST
    gone, never = f"the launcher of machine 0 (localhost:{port}) is gone", f"no launcher at localhost:{port} for NODE_"
    assert said.startswith((f"launch: {gone}\n", f"launch: {never}"))
    assert said.endswith("launch: rank 1 did not end; killed\n")
    assert first.living() == second.living() == []
