"""Files that survive a kill: whole files, staged folders, locks, logs of lines."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from sft import files
from tests.conftest import ROOT


def finished_process() -> dict:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return {**files.this_process(), "pid": process.pid}


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"新": 1})
    with pytest.raises(ZeroDivisionError), files.open_whole(path) as stream:
        stream.write("half")
        1 / 0  # noqa: B018
    assert path.read_text() == '{\n  "新": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]
    files.write_text(path, "surrogate \ud800")
    assert path.read_text() == "surrogate ?"


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path):
    files.write_text(tmp_path / "whole", "")
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    with files.stage_folder(tmp_path / "staged"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "staged").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_staged_folder_appears_at_the_end_and_leaves_nothing_after_an_error(tmp_path):
    with files.stage_folder(tmp_path / "new") as staged:
        (staged / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError), files.stage_folder(tmp_path / "other"):
        1 / 0  # noqa: B018
    with pytest.raises(OSError, match="not empty"), files.stage_folder(tmp_path / "new"):
        pass
    assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "1"


def test_a_file_is_fsynced_before_it_is_renamed(tmp_path, monkeypatch):
    steps = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(kind, function):
        def call(*arguments):
            first = arguments[0]
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            steps.append((kind, os.path.basename(where)))
            return function(*arguments)

        return call

    for kind, function in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, kind, record(kind, function))
    monkeypatch.setattr(files, "temporary_path", lambda target: target.with_name(f"{target.name}.partial"))
    files.write_text(tmp_path / "a", "1")
    with files.stage_folder(tmp_path / "folder") as staged:
        (staged / "b").write_text("2")
    files.move_files(tmp_path / "folder", tmp_path, ["b"])
    assert steps == [
        ("fsync", "a.partial"),
        ("replace", "a.partial"),
        ("fsync", "b"),
        ("fsync", "folder.partial"),
        ("rename", "folder.partial"),
        ("fsync", tmp_path.name),
        ("fsync", "b"),
        ("replace", "b"),
        ("fsync", tmp_path.name),
    ]


def test_an_exit_without_finally_can_delete_what_is_unfinished(tmp_path):
    with files.stage_folder(tmp_path / "folder") as staged, files.open_whole(tmp_path / "file") as stream:
        (staged / "a").write_text("1")
        stream.write("2")
        assert len(os.listdir(tmp_path)) == 2
        files.remove_temporaries()
        assert os.listdir(tmp_path) == []
        staged.mkdir()
        stream.flush()
        open(stream.name, "w").close()


def test_the_unfinished_folder_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".key.0000.partial").mkdir()
    (tmp_path / ".other.0000.partial").mkdir()
    files.remove_abandoned(tmp_path / "key")
    assert os.listdir(tmp_path) == [".other.0000.partial"]


@pytest.mark.parametrize("one_step", [True, False])
def test_two_names_are_exchanged(tmp_path, monkeypatch, one_step):
    if not one_step:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_arguments, **_options: None)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    files.exchange_names(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"
    assert (tmp_path / "b").is_dir()


# --- a log of lines -----------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_is_not_read_and_is_removed_by_the_next(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    log = files.LineLog(path, busy="busy")
    assert list(log.read()) == [(0, b"one\n"), (4, b"two\n")]
    assert path.read_bytes() == b"one\ntwo\nthr", "reading changes nothing: it may be somebody's file"
    assert log.append(b"three\n") == 8
    assert log.append(b"four\n") == 14
    log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_a_log_has_one_writer(tmp_path):
    first = files.LineLog(tmp_path / "log", busy="another process writes it")
    with pytest.raises(ValueError, match="another process writes it"):
        files.LineLog(tmp_path / "log", busy="another process writes it")
    first.close()
    files.LineLog(tmp_path / "log", busy="").close()


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def no_locks(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    files.LineLog(tmp_path / "log", busy="busy").close()


# --- locks between machines ---------------------------------------------------------------------------------------


def test_a_lock_names_its_holder_until_it_is_released(tmp_path):
    path = tmp_path / "lock"
    assert files.try_lock(path) is None
    holder = files.try_lock(path)
    assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    files.release_lock(path)
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    for holder in (finished_process(), {**files.this_process(), "start": "1"}):
        path.write_text(json.dumps(holder))
        assert files.try_lock(path) is None
        assert json.loads(path.read_text())["pid"] == os.getpid()
        path.unlink()


def test_of_two_that_find_a_lock_abandoned_one_gets_it(tmp_path, monkeypatch):
    """The second begins where the first has read the lock again, and is about to delete it."""
    path = tmp_path / "lock"
    path.write_text(json.dumps(finished_process()))
    read = files._read_lock
    found = []
    second = threading.Thread(target=lambda: found.append(files.try_lock(path)))
    reads = []

    def read_and_start_second(lock):
        result = read(lock)
        reads.append(lock)
        if len(reads) == 2:
            second.start()
            second.join(0.3)
        return result

    monkeypatch.setattr(files, "_read_lock", read_and_start_second)
    found.append(files.try_lock(path))
    second.join()
    assert sum(holder is None for holder in found) == 1


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_the_lock_of_another_machine_or_container_holds_as_long_as_it_is_touched(tmp_path, other):
    path = tmp_path / "lock"
    path.write_text(json.dumps({**finished_process(), **other}))
    assert files.try_lock(path)["pid"] > 0
    os.utime(path, (1, 1))
    assert files.try_lock(path) is None


def test_locks_work_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert files.try_lock(tmp_path / "lock") is None
    assert files.try_lock(tmp_path / "lock")["pid"] == os.getpid()


def test_a_holder_is_waited_for_and_named_once(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sft.files import hold_lock\n"
        f"with hold_lock(Path({str(path)!r}), on_wait=print):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    waited_for = []

    def release(holder):
        waited_for.append(holder["pid"])
        other.stdin.close()

    with files.hold_lock(path, on_wait=release):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert waited_for == [other.pid]
    assert other.wait(timeout=60) == 0
    assert os.listdir(tmp_path) == []


def test_a_lock_that_another_has_taken_over_is_left_to_it(tmp_path):
    path = tmp_path / "lock"
    with files.hold_lock(path, on_wait=print):
        path.write_text(json.dumps({**files.this_process(), "host": "elsewhere"}))
    assert path.exists()


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    path, touched = tmp_path / "lock", files.threading.Event()
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.01)
    with files.hold_lock(path, on_wait=print):
        monkeypatch.setattr(os, "utime", lambda where: touched.set() if where == path else None)
        assert touched.wait(20)


def test_a_killed_holder_is_followed_by_the_next(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import os\nfrom pathlib import Path\nfrom sft.files import try_lock\n"
        f"try_lock(Path({str(path)!r}))\nos.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert path.exists()
    with files.hold_lock(path, on_wait=print):
        assert json.loads(path.read_text())["pid"] == os.getpid()
