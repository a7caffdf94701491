"""Signals, lost ranks, and two runs in one folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sft.files import start_time, this_process
from sft.launch import processes
from sft.launch.processes import LOCK, RANKS, Guard, Stopped, UserError, lock_folder
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def script(code: str, **environment: str) -> subprocess.Popen:
    """A Python process that imports the guard and then runs `code`."""
    code = "import os, signal, sys, time\nfrom sft.launch.processes import *\n" + code
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=settings, text=True, **pipes)


def dead_process() -> dict:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return {**this_process(), "pid": process.pid}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_before_the_first_step_a_signal_ends_the_process_even_inside_a_call_that_does_not_return(name):
    process = script("with Guard():\n    print('ready', flush=True)\n    time.sleep(600)\n")
    process.stdout.readline()
    process.send_signal(signal.Signals[name])
    _out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert errors == f"train.py: {name} before the first step; nothing to save\n"


def test_a_signal_ends_a_process_whose_error_stream_has_no_reader():
    """As in `... 2>&1 | tee log`, where Ctrl-C ends tee first."""
    process = script("with Guard():\n    print('ready', flush=True)\n    time.sleep(600)\n")
    process.stdout.readline()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdout.close()


def test_a_full_disk_does_not_end_the_thread_that_handles_signals(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes, "write_json", full)
    monkeypatch.setattr(processes.os, "utime", full)
    with Guard() as guard:
        guard.lock = guard.folder = tmp_path / "gone"
        guard.stage = "training"
        guard.handle_signal(signal.SIGTERM)
        guard._watch_ranks(time.monotonic())
        guard.lock = None
        assert guard.requested == signal.SIGTERM


def test_a_signal_in_training_is_kept_for_the_end_of_the_step_and_a_second_changes_nothing():
    with Guard() as guard:
        guard.stage = "training"
        assert guard.stop_requested() is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 60
            while guard.requested is None and time.monotonic() < deadline:
                threading.Event().wait(0.01)
        assert guard.stop_requested() == signal.SIGUSR1


def test_a_process_that_exits_next_has_closed_its_groups_also_after_an_error(tmp_path):
    process = script(
        "from torch import distributed\n"
        "for ended in ('well', 'by an error of all ranks', 'by its own error'):\n"
        f"    store = distributed.FileStore({str(tmp_path)!r} + '/' + ended, 1)\n"
        "    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "    try:\n"
        "        with Guard(lasting=True) as guard:\n"
        "            guard.stage = 'training'\n"
        "            if ended != 'well': raise UserError if 'all' in ended else OSError\n"
        "    except (UserError, OSError): pass\n"
        "    print(distributed.is_initialized())\n"
    )
    out, errors = process.communicate(timeout=60)
    assert (out, process.returncode) == ("False\nFalse\nFalse\n", 0), errors


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("sys.exit(75)", 75), ("sys.exit()", 0)])
def test_a_rank_ends_without_pythons_finalizers_but_with_its_threads_and_what_is_registered(ending, code):
    """Process groups that DeepSpeed keeps may abort a process in its finalizers."""
    process = script(
        "import atexit, threading\n"
        "class Group:\n    def __del__(self, abort=os.abort): abort()\n"
        "kept = Group()\n"
        "atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        f"with Guard(lasting=True):\n    {ending}\n",
        WORLD_SIZE="2",
    )
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (code, "thread\nregistered\n", "")


def test_nccl_waits_only_for_ranks_that_leave_as_well():
    process = script(
        "from sft.launch import processes\n"
        "processes.close_process_groups = lambda *, abort: print(abort)\n"
        "for error in (None, Stopped(), UserError(), SystemExit(STOPPED), SystemExit(LOST), OSError()):\n"
        "    for stage in ('loading', 'training'):\n"
        "        try:\n"
        "            with Guard(lasting=True) as guard:\n"
        "                guard.stage = stage\n"
        "                if error: raise error\n"
        "        except BaseException: pass\n"
    )
    out, errors = process.communicate(timeout=60)
    assert (out.split(), process.returncode) == (["False"] * 8 + ["True"] * 4, 0), errors


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
    with Guard():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)] == before


def test_sigint_is_received_in_the_background_of_a_shell_and_sighup_is_not_under_nohup():
    process = script(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with Guard() as guard:\n    guard.stage = 'training'\n    print('ready', flush=True)\n"
        "    while guard.requested is None: time.sleep(0.01)\n    print(guard.requested)\n"
    )
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "2\n"


def test_a_forked_worker_has_its_own_signals():
    with Guard() as guard:
        guard.stage = "training"
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert guard.requested is None


def test_the_process_ends_when_the_launcher_is_gone():
    """A shell instead of the launcher: it starts a worker in the background, prints its number, and is killed."""
    code = (
        'from sft.launch.processes import Guard\nimport time\nwith Guard(): print("ready", flush=True); time.sleep(600)'
    )
    command = f"LOCAL_RANK=0 {sys.executable} -c '{code}' & echo $!; wait"
    launcher = subprocess.Popen(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read() == ""  # the worker's end is closed: it has ended
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(worker, 0)


def test_a_second_run_in_a_folder_is_refused_with_the_first_ones_process(tmp_path):
    lock_folder(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()} since .* trains into it"):
        lock_folder(tmp_path)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    for holder in (dead_process(), {**this_process(), "start": "1"}):
        (tmp_path / LOCK).write_text(json.dumps(holder))
        assert json.loads(lock_folder(tmp_path).read_text())["pid"] == os.getpid()
        (tmp_path / LOCK).unlink()


def test_a_lock_that_could_not_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(UserError, match=r"--output_dir .*: No space left on device"), Guard() as guard:
            guard.lock_output_dir(str(tmp_path), timeout=9, resume_command="")
    assert os.listdir(tmp_path) == []


def test_the_lock_of_another_machine_holds_as_long_as_it_is_touched(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({**this_process(), "host": "elsewhere", "start": "1"}))
    with pytest.raises(ValueError, match="on elsewhere since"):
        lock_folder(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    assert json.loads(lock_folder(tmp_path).read_text())["host"] == socket.gethostname()


def test_a_run_that_saves_its_last_checkpoint_is_waited_for(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({**this_process(), "stopping": True}))
    threading.Timer(0.3, (tmp_path / LOCK).unlink).start()
    assert lock_folder(tmp_path).is_file()


def test_the_folder_is_left_as_it_was_found(tmp_path):
    with Guard() as guard:
        guard.lock_output_dir(str(tmp_path / "new"), timeout=9, resume_command="")
        assert sorted(os.listdir(tmp_path / "new")) == [LOCK, RANKS]
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="trains into it"), Guard() as guard:
        lock_folder(tmp_path)
        guard.lock_output_dir(str(tmp_path), timeout=9, resume_command="")
    assert os.listdir(tmp_path) == [LOCK]


@pytest.mark.parametrize(
    ("state", "said"),
    [("dead", r"rank 1 \(process \d+ on .*\) died"), ("frozen", r"rank 1 .* has not answered for \d+ seconds")],
)
def test_a_rank_that_died_or_froze_ends_the_others_with_its_name(tmp_path, state, said):
    """Rank 0 of two, without a process group: its guard reads the heartbeat of rank 1."""
    code = (
        "from pathlib import Path\nwith Guard() as guard:\n    guard.world_size = 2\n"
        f"    guard.folder, guard.timeout, guard.stage = Path({str(tmp_path)!r}), 2.0, 'training'\n"
        "    guard.resume_command = 'continue'\n    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (tmp_path / RANKS).mkdir()
    (tmp_path / RANKS / "1").write_text(
        json.dumps({**this_process(), "pid": other.pid, "start": start_time(other.pid)})
    )
    if state == "dead":
        other.kill()
        other.wait()
    process = script(code, RANK="0")
    _out, errors = process.communicate(timeout=60)
    assert process.returncode == 76
    assert re.search(said + r".*; the run ends, continue", errors), errors
    other.wait(timeout=60)  # a frozen one on the same machine is killed, so that nothing is left


def test_training_that_is_over_stops_for_a_signal_that_came_before():
    guard = Guard()
    guard.requested = signal.SIGTERM
    with pytest.raises(Stopped):
        guard.end_training()


def test_no_rank_counts_as_frozen_before_the_timeout_is_known():
    """Rank 0 has its folder before the others have answered; a second must not count as too long."""
    assert Guard().timeout == float("inf")


def test_a_signal_before_the_first_step_leaves_no_temporary_file(tmp_path):
    process = script(
        f"from pathlib import Path\nfrom sft.files import hold_lock, stage_folder\nfolder = Path({str(tmp_path)!r})\n"
        "with Guard(), hold_lock(folder / 'lock', on_wait=print), stage_folder(folder / 'new') as staged:\n"
        "    (staged / 'half').write_text('')\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    assert process.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert os.listdir(tmp_path) == []


def test_a_rank_whose_file_rank_0_removes_ends_without_an_error(tmp_path, monkeypatch):
    guard = Guard()
    guard.folder = tmp_path
    own = tmp_path / RANKS / "0"
    own.parent.mkdir()
    own.write_text(json.dumps(this_process()))
    read = Path.read_text

    def read_after_the_others(path, *arguments, **options):
        shutil.rmtree(own.parent)
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_after_the_others)
    guard._remove_own_files(keep_rank=False)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_with_other_files_than_rank_0_is_named_on_every_rank(monkeypatch):
    guard = Guard()
    ours = {"seed": 1, "data": {"a.json": "1", "b.json": "2"}, "held-out data": {}}
    theirs = {"seed": 1, "data": {"a.json": "1", "b.json": "3"}, "held-out data": {}, "lora_router": True}
    monkeypatch.setattr(guard, "all_gather", lambda own: [own, own, ("node2", theirs)])
    with pytest.raises(
        UserError, match=r"^rank 2 on node2 has not the data \(b\.json\), lora_router of rank 0; all machines"
    ):
        guard.check_same(ours)
    monkeypatch.setattr(guard, "all_gather", lambda own: [own, own])
    guard.check_same(ours)


@pytest.mark.parametrize(
    ("stage", "error", "printed_by"),
    [
        ("loading", OSError(), "machines"),
        ("training", OSError(), "all"),
        ("loading", UserError(), "first rank"),
        ("training", UserError(), "first rank"),
    ],
)
def test_an_error_is_printed_by_each_machine_or_rank_that_may_have_it_alone(stage, error, printed_by):
    with pytest.raises(type(error)), Guard() as guard:
        guard.stage = stage
        raise error
    assert error.printed_by == printed_by
