"""Files of torch.save are hashed while they are written."""

import hashlib

import pytest
import torch

from sft.checkpoint import writing
from sft.checkpoint.manifest import hash_files
from sft.checkpoint.writing import hash_while_saving


def test_the_hash_is_that_of_the_file_and_the_file_is_read_as_ever(tmp_path):
    (tmp_path / "global_step1").mkdir()
    state = {"large": torch.arange(1 << 19), "small": torch.ones(3), "step": 4}
    save = torch.save
    with hash_while_saving(tmp_path) as hashes:
        torch.save(state, str(tmp_path / "global_step1" / "optimizer.pt"))
        torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        torch.save([1], tmp_path / "replaced.pt")
        torch.save([2], tmp_path / "replaced.pt")
    assert torch.save is save
    assert sorted(hashes) == ["global_step1/optimizer.pt", "legacy.pt", "replaced.pt"]
    assert hashes == hash_files(tmp_path, hashes)
    for name in ("global_step1/optimizer.pt", "legacy.pt"):
        loaded = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(loaded["large"], state["large"]) and loaded["step"] == 4
    assert torch.equal(torch.load(tmp_path / "global_step1/optimizer.pt", mmap=True)["large"], state["large"])


def test_files_elsewhere_and_streams_are_saved_as_before(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with hash_while_saving(tmp_path / "checkpoint") as hashes, open(tmp_path / "stream.pt", "wb") as stream:
        torch.save([1], tmp_path / "elsewhere.pt")
        torch.save([2], stream)
    assert hashes == {}
    assert torch.load(tmp_path / "elsewhere.pt") == [1] and torch.load(tmp_path / "stream.pt") == [2]


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_hash(tmp_path, monkeypatch):
    def fill(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fill)
    with hash_while_saving(tmp_path) as hashes, pytest.raises(OSError, match="No space left"):
        torch.save([1], tmp_path / "a.pt")
    assert hashes == {}


def test_a_piece_that_the_system_writes_in_parts_is_written_whole(tmp_path, monkeypatch):
    """A system call may write less than it was given: 2 GiB at most."""
    stream = writing.HashingStream(tmp_path / "a")
    file = stream._stream

    class Short:
        def write(self, data):
            return file.write(data[:5])

        def __getattr__(self, name):
            return getattr(file, name)

    stream._stream = Short()
    stream.write(b"0123456789abc")
    assert stream.close() == [13, hashlib.sha256(b"0123456789abc").hexdigest()]
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"
