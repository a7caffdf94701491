"""Preparations before the workers start."""

import os
import time

from sft.launch.workers import remove_dead_build_locks


def test_the_lock_of_a_killed_compilation_is_removed_and_that_of_a_living_one_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    dead, living, new = (tmp_path / name / "lock" for name in ("py311_cpu/dead", "living", "new"))
    for lock in (dead, living, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 60, time.time() - 60))
    os.utime(new)
    remove_dead_build_locks(shared=True)
    assert dead.exists()
    with open(living):
        remove_dead_build_locks(shared=False)
    assert [dead.exists(), living.exists(), new.exists()] == [False, True, True]
    assert capsys.readouterr().err == f"launch: {dead}: removed; the compilation that held it was killed\n"
