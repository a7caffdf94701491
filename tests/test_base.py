"""Which base an adapter was trained from: hashed, stored, and another base of the same shape refused by name."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from sft import base
from sft.base import BaseIdentity, check_base, find_difference, find_weights, hash_model, identify_base
from sft.chat.reply import load_base, load_chat
from sft.evaluate.exam import _model_of
from sft.export.merge import export_merged
from sft.format.render import Renderer
from sft.model.adapters import add_lora
from sft.model.load import check_model_path, load_model, load_tokenizer


@pytest.fixture
def adapter(tiny_base, tmp_path) -> Path:
    """The folder of an adapter, with a base of its own beside it that a test may change."""
    folder, own_base = tmp_path / "adapter", str(shutil.copytree(tiny_base("qwen2"), tmp_path / "base"))
    tokenizer = load_tokenizer(own_base)
    tokenizer.chat_template = Renderer(tokenizer, "blossom").chat_template
    model = add_lora(load_model(own_base), rank=2, alpha=4, dropout=0.0)
    BaseIdentity(own_base, cache_dir=str(tmp_path / "cache"), say=print).store_with_adapters(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flip_a_byte(file: Path, *, place: int = -100) -> None:
    """Change one byte, and set the file's times back."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def set_base(adapter: Path, path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(path)}))


def test_an_adapter_is_stored_with_the_hash_of_its_base(adapter, tmp_path):
    stored = json.loads((adapter / "base.json").read_text())
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    assert stored["weights"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert (stored["model"], stored["revision"]) == (str(tmp_path / "base"), None)
    assert load_chat(str(adapter), device="cpu").renderer.name == "blossom"


def test_a_base_with_one_other_byte_is_refused_by_every_command_that_loads_the_adapter(adapter, tmp_path):
    flip_a_byte(tmp_path / "base" / "model.safetensors")
    message = re.compile(
        f"^{adapter}: was trained from {tmp_path}/base \\(weights [0-9a-f]{{8}}\\), and {tmp_path}/base \\(weights "
        f"[0-9a-f]{{8}}\\) is another base: the weights in model.safetensors differ; put that base back, or write its "
        f"path into {adapter}/adapter_config.json$"
    )
    options = type("Options", (), {"base_url": None, "model_path": str(adapter), "trust_remote_code": False})
    for use in (load_chat, lambda path: export_merged(path, str(tmp_path / "new")), lambda _path: _model_of(options)):
        with pytest.raises(ValueError, match=message):
            use(str(adapter))
    assert not (tmp_path / "new").exists()


def test_a_base_of_the_same_shape_is_another_one_and_a_moved_base_is_not(adapter, tiny_base, tmp_path, capsys):
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    assert f"its base {tmp_path}/base is not there; put it back" in check_model_path(
        str(adapter), ("adapter_config.json",)
    )
    set_base(adapter, moved)
    load_chat(str(adapter), device="cpu")
    other = load_model(str(moved))
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.bfloat16().save_pretrained(tmp_path / "other")
    set_base(adapter, tmp_path / "other")
    with pytest.raises(ValueError, match=f"and {tmp_path}/other .* is another base: the weights in model.safetensors"):
        load_chat(str(adapter))
    assert "note:" not in capsys.readouterr().err


def test_settings_that_change_the_model_count_and_those_of_the_writer_do_not(adapter, tmp_path):
    config = tmp_path / "base" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(
        json.dumps(dict(reversed(settings.items())) | {"transformers_version": "4.0", "dtype": "float32"})
    )
    check_base(adapter, str(tmp_path / "base"))
    config.write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"is another base: its config\.json differs; put that base back"):
        check_base(adapter, str(tmp_path / "base"))


def test_an_adapter_without_a_hash_loads_with_a_note(adapter, tmp_path, capsys):
    (adapter / "base.json").unlink()
    load_chat(str(adapter), device="cpu")
    note = f"{adapter} holds no hash of its base, so {tmp_path}/base is not compared with the one it was trained from"
    assert capsys.readouterr().err.startswith(f"note: {note}\n")


@pytest.mark.parametrize("record", ["[]", "5", '{"model": "x"}', "{"])
def test_a_damaged_record_of_the_base_counts_as_none(record, adapter, capsys):
    (adapter / "base.json").write_text(record)
    (adapter / "run.json").write_text("[1]")
    load_chat(str(adapter), device="cpu")
    assert f"{adapter} holds no hash of its base" in capsys.readouterr().err


def test_an_adapter_is_no_base_and_says_how_it_is_merged_or_continued(adapter, tmp_path):
    problem = check_model_path(str(adapter))
    assert problem.startswith(f"{adapter}: is a LoRA adapter of {tmp_path}/base, not a base; merge it (python -m sft.")
    assert f"--model_path {adapter} --output_dir NEW" in problem
    assert f"continue its run with --model_name_or_path {tmp_path}/base" in problem
    set_base(adapter, adapter)
    assert "its base" in check_model_path(str(adapter), ("config.json", "adapter_config.json"))


def test_a_full_model_is_shown_beside_the_base_that_it_was_trained_from(tiny_base, tmp_path, capsys):
    own_base, tuned = (str(shutil.copytree(tiny_base("qwen2"), tmp_path / name)) for name in ("base", "tuned"))
    record = {"model": own_base, "base": identify_base(own_base)}
    Path(tuned, "run.json").write_text(json.dumps(record))
    chat = load_chat(tuned, device="cpu")
    load_base(chat, tuned, device="cpu")
    flip_a_byte(Path(own_base, "model.safetensors"))
    with pytest.raises(ValueError, match="put that base back, or name it with --base_path"):
        load_base(chat, tuned, device="cpu")
    chat.renderer.template_kwargs = {"tone": "dry"}
    assert load_base(chat, tuned, own_base, device="cpu").renderer.template_kwargs == {"tone": "dry"}
    assert "note:" not in capsys.readouterr().err


def test_the_shards_of_the_index_are_the_weights_and_all_of_them_count(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "config.json").write_text("{}")
    assert [file.name[0] for file in find_weights(tmp_path)] == ["a", "b", "c"]
    shards = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert [file.name for file in find_weights(tmp_path)] == ["a.safetensors", "b.safetensors"]
    first = identify_base(str(tmp_path))
    (tmp_path / "consolidated.safetensors").write_bytes(b"other")
    assert find_difference(first, identify_base(str(tmp_path))) is None
    (tmp_path / "b.safetensors").write_bytes(b"other")
    assert find_difference(first, identify_base(str(tmp_path))) == "the weights in b.safetensors differ"
    (tmp_path / "a.safetensors").write_bytes(b"others")
    assert find_difference(first, identify_base(str(tmp_path))) == "the weights in a.safetensors and 1 more differ"
    fewer = identify_base(str(tmp_path)) | {"weights": {"a.safetensors": first["weights"]["a.safetensors"]}}
    assert find_difference(first, fewer) == "it has 1 files of weights instead of 2"
    (tmp_path / "b.safetensors").unlink()
    assert identify_base(str(tmp_path)) is None


def test_a_model_of_the_hub_is_known_by_the_names_of_its_blobs(tmp_path, monkeypatch):
    cache, commit, blob = tmp_path / "models--owner--name", "0" * 40, "ab" * 32
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    for name, target in (("config.json", "c" * 40), ("model.safetensors", blob)):
        (cache / "blobs" / target).write_text("{}")
        (cache / "snapshots" / commit / name).symlink_to(f"../../blobs/{target}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = identify_base("owner/name")
    assert (found["model"], found["revision"], found["weights"]) == ("owner/name", commit, {"model.safetensors": blob})
    assert found["config"] == hashlib.sha256(b"{}").hexdigest()
    assert identify_base("owner/other") is None
    assert identify_base("/no/such/folder") is None


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    file, cache, read = tmp_path / "model.safetensors", tmp_path / "cache", []
    file.write_bytes(b"weights" * 100)
    digest = hashlib.file_digest
    monkeypatch.setattr(base.hashlib, "file_digest", lambda stream, name: read.append(1) or digest(stream, name))
    monkeypatch.setattr(base, "MIN_CACHED_BYTES", 1)
    first = base.hash_once(file, cache)
    assert not cache.exists(), "a file that was written just now may change again within one tick of the clock"
    monkeypatch.setattr(base, "SETTLED_NS", 0)
    assert [base.hash_once(file, cache) for _ in range(3)] == [first] * 3
    assert len(read) == 2
    flip_a_byte(file)
    assert base.hash_once(file, cache) == hashlib.sha256(file.read_bytes()).hexdigest() != first


def test_a_run_whose_base_is_gone_meanwhile_stores_none_and_says_so(tmp_path):
    said = []
    identity = BaseIdentity(str(tmp_path / "gone"), cache_dir=str(tmp_path), say=said.append)
    identity.start()
    assert identity.wait() is None
    assert said == [f"{tmp_path}/gone: its files were not all found, so the run doesn't store which base it has"]


def test_a_model_and_an_adapter_have_one_hash_of_config_and_weights(tiny_base, tmp_path):
    model = shutil.copytree(tiny_base("qwen2"), tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    cache = str(tmp_path / "cache")
    for folder, changed in ((model, "model.safetensors"), (model, "config.json"), (adapter, "adapter_config.json")):
        before = hash_model(str(folder), cache_dir=cache)
        assert before == hash_model(str(folder), cache_dir=cache)
        (folder / changed).write_bytes((folder / changed).read_bytes() + b" ")
        assert hash_model(str(folder), cache_dir=cache) != before
    assert hash_model("owner/name", cache_dir=cache) is None
