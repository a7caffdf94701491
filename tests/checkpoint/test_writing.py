"""The files of a checkpoint are copied when it is saved, and hashed while they are written."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import modeling_utils

from sft.checkpoint import writing
from sft.checkpoint.manifest import hash_files
from sft.checkpoint.writing import collect_files
from tests.conftest import ROOT

PLENTY = 1 << 30  # bytes


def make_state() -> dict:
    """Return tensors of which two share memory, and other values."""
    large = torch.arange(1 << 19)
    return {"large": large, "part": large[5:7], "small": torch.ones(3), "step": 4}


@pytest.mark.parametrize("max_bytes", [PLENTY, 0], ids=["copied", "no room"])
def test_files_are_those_of_the_moment_of_the_save_and_their_hashes_are_right(max_bytes, tmp_path):
    (tmp_path / "global_step1").mkdir()
    state, expected, save = make_state(), make_state(), torch.save
    torch.save(expected, tmp_path / "expected.zip")
    with collect_files(tmp_path, max_bytes) as files:
        torch.save(state, str(tmp_path / "global_step1" / "optimizer.pt"), _use_new_zipfile_serialization=True)
        torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        torch.save([1], tmp_path / "replaced.pt")
        torch.save([2], tmp_path / "replaced.pt", _use_new_zipfile_serialization=False)
        torch.save([3], tmp_path / "training_args.bin")
        modeling_utils.safe_save_file({"a": state["small"]}, str(tmp_path / "a.safetensors"), metadata={"b": "c"})
    assert torch.save is save and files.has_no_room == (not max_bytes)
    for tensor in state.values():  # training continues
        if isinstance(tensor, torch.Tensor):
            tensor += 7
    hashes = files.write()
    assert sorted(hashes) == ["a.safetensors", "global_step1/optimizer.pt", "legacy.pt", "replaced.pt"]
    assert hashes == hash_files(tmp_path, hashes)
    for name in ("global_step1/optimizer.pt", "legacy.pt"):
        loaded = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(loaded[key], expected[key]) for key in ("large", "part", "small"))
        assert loaded["step"] == 4
        assert loaded["large"].data_ptr() + 5 * 8 == loaded["part"].data_ptr()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(3))
    assert torch.load(tmp_path / "replaced.pt") == [2]
    assert not (tmp_path / "training_args.bin").exists()


def test_a_file_is_written_byte_for_byte_as_torch_does_it(tmp_path):
    with collect_files(tmp_path, PLENTY) as files:
        torch.save(make_state(), tmp_path / "later.pt")
    files.write()
    with open(tmp_path / "at_once.pt", "wb") as stream:
        torch.save(make_state(), stream)
    assert (tmp_path / "later.pt").read_bytes() == (tmp_path / "at_once.pt").read_bytes()


def test_copies_take_no_more_memory_than_there_is(tmp_path):
    with collect_files(tmp_path, 5000) as files:
        for name in ("a.pt", "b.pt", "c.pt"):
            torch.save(torch.ones(500), tmp_path / name)
    assert sorted(files.waiting) == ["a.pt", "b.pt"] and sorted(files.hashes) == ["c.pt"]
    assert files.has_no_room


@pytest.mark.slow
def test_a_copy_that_a_limit_of_the_process_refuses_is_written_at_once(tmp_path):
    """Linux says that there is memory, as under ulimit -v."""
    code = (
        "import re, resource, sys, torch\n"
        "from pathlib import Path\n"
        "from sft.checkpoint.writing import collect_files\n"
        "state = torch.arange(10 << 20)\n"
        "size = int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20),) * 2)\n"
        "with collect_files(Path(sys.argv[1]), 1 << 40) as files:\n"
        "    torch.save(obj=state, f=sys.argv[1] + '/optimizer.pt')\n"
        "assert files.has_no_room and list(files.hashes) == ['optimizer.pt'], files.names()\n"
    )
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=settings, check=True, timeout=100)
    assert torch.equal(torch.load(tmp_path / "optimizer.pt"), torch.arange(10 << 20))


def test_a_file_without_room_for_its_copy_leaves_the_room_to_the_next_one(tmp_path):
    with collect_files(tmp_path, 3000) as files:
        torch.save([torch.ones(600), torch.ones(600)], tmp_path / "large.pt")
        torch.save([torch.ones(700)], tmp_path / "small.pt")
    assert list(files.hashes) == ["large.pt"]
    assert list(files.waiting) == ["small.pt"]


def test_writing_ends_at_the_next_tensor_when_it_is_given_up(tmp_path, monkeypatch):
    with collect_files(tmp_path, PLENTY) as files:
        torch.save([torch.ones(500), torch.ones(600)], tmp_path / "a.pt")
        torch.save([1], tmp_path / "b.pt")
    write = writing.HashingStream.write

    def write_and_give_up(stream, data):
        files.is_given_up |= len(data) == 2000
        return write(stream, data)

    monkeypatch.setattr(writing.HashingStream, "write", write_and_give_up)
    with pytest.raises(writing.GivenUpError):
        files.write()
    assert 2000 < (tmp_path / "a.pt").stat().st_size < 4000
    assert not (tmp_path / "b.pt").exists() and files.hashes == {}


def test_a_copy_that_torch_makes_of_a_gpu_and_that_has_no_room_is_written_at_once(tmp_path, monkeypatch):
    save = torch.serialization._save
    errors = [RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("storage has wrong size")]

    def save_or_fail(value, records, *arguments):
        if isinstance(records, writing.ZipRecords):
            raise errors.pop(0)
        save(value, records, *arguments)

    monkeypatch.setattr(torch.serialization, "_save", save_or_fail)
    with collect_files(tmp_path, PLENTY) as files:
        torch.save([1], tmp_path / "a.pt")
        with pytest.raises(RuntimeError, match="wrong size"):
            torch.save([1], tmp_path / "b.pt")
    assert files.has_no_room and list(files.hashes) == ["a.pt"] and torch.load(tmp_path / "a.pt") == [1]


def test_files_elsewhere_and_streams_are_saved_as_before(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with collect_files(tmp_path / "checkpoint", PLENTY) as files, open(tmp_path / "stream.pt", "wb") as stream:
        torch.save([1], tmp_path / "elsewhere.pt")
        torch.save([2], stream)
        modeling_utils.safe_save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert files.names() == []
    assert torch.load(tmp_path / "elsewhere.pt") == [1] and torch.load(tmp_path / "stream.pt") == [2]
    assert load_file(tmp_path / "a.safetensors").keys() == {"a"}


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_hash(tmp_path, monkeypatch):
    def fill(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fill)
    with collect_files(tmp_path, PLENTY) as files:
        torch.save([1], tmp_path / "a.pt")
    with pytest.raises(OSError, match="No space left"):
        files.write()
    assert files.hashes == {}


class FailingFile:
    """A file whose third write fails, so that torch finds the end of its zip at another place."""

    def __init__(self, file):
        self._file = file
        self._num_writes = 0

    def write(self, data):
        self._num_writes += 1
        if self._num_writes == 3:
            raise OSError(5, "Input/output error")
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._file.close()

    def fileno(self):
        raise AssertionError("fsync of a file that could not be written")


def test_the_error_of_a_write_is_reported_and_not_a_later_one(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), writing.HashingStream(tmp_path / "a") as stream:
        stream._stream = FailingFile(stream._stream)
        torch.save(torch.ones(3), stream)


def test_a_piece_that_the_system_writes_in_parts_is_written_whole(tmp_path):
    """A system call may write less than it was given: 2 GiB at most."""
    with writing.HashingStream(tmp_path / "a") as stream:
        file = stream._stream

        class Short:
            def write(self, data):
                return file.write(data[:5])

            def __enter__(self):
                return file

            def __exit__(self, *_error):
                file.close()

            def fileno(self):
                return file.fileno()

        stream._stream = Short()
        stream.write(b"0123456789abc")
    assert stream.size_and_hash() == [13, hashlib.sha256(b"0123456789abc").hexdigest()]
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"
