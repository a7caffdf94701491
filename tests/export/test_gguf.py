"""A GGUF computes what transformers computes; otherwise no folder is written."""

import stat
import sys

import pytest
from safetensors.torch import load_file, save_file

from sft.export import gguf
from sft.export.gguf import export_gguf, find_converter, find_quantiser
from tests.conftest import CONVERTERS, needs_llama_cpp
from tests.families import FAMILIES


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_as_transformers_does(trained, family, tmp_path):
    if family == "falcon-rw":
        with pytest.raises(ValueError, match=r"has ALiBi, with a scale that llama\.cpp lacks"):
            export_gguf(trained(family), str(tmp_path / "gguf"), llama_cpp=str(CONVERTERS[-1]))
        assert list(tmp_path.iterdir()) == []
        return
    result = export_gguf(trained(family), str(tmp_path / "gguf"), outtype="f16", llama_cpp=str(CONVERTERS[-1]))
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model-f16.gguf"]
    assert result.startswith("f16: 12 texts and 8 prompts give the same ids; ")
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


@needs_llama_cpp
@pytest.mark.slow
def test_an_adapter_becomes_a_gguf_with_the_control_tokens_of_chatml(adapter, trained, tmp_path):
    result = export_gguf(adapter, str(tmp_path / "q8"), outtype="q8_0", llama_cpp=str(CONVERTERS[-1]))
    assert result.startswith("q8_0: ")
    assert (tmp_path / "q8" / "model-q8_0.gguf").is_file()
    export_gguf(trained("yi", "chatml"), str(tmp_path / "yi"), outtype="f32", llama_cpp=str(CONVERTERS[-1]))


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_with_other_weights_is_refused_and_no_folder_is_left(trained, tmp_path, monkeypatch):
    def write_other_weights(chat, folder, source):
        written = write_converter_input(chat, folder, source)
        weights = load_file(written / "model.safetensors")
        weights["model.norm.weight"] *= -1
        (written / "model.safetensors").unlink()
        save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
        return written

    write_converter_input = gguf.write_converter_input
    monkeypatch.setattr(gguf, "write_converter_input", write_other_weights)
    with pytest.raises(ValueError, match=r"only \d+ of \d+ greedy tokens equal"):
        export_gguf(trained("qwen2"), str(tmp_path / "gguf"), llama_cpp=str(CONVERTERS[-1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (None, "--to gguf needs --llama_cpp"),
        ("folder", "no convert_hf_to_gguf.py in it"),
        ("broken.tar.gz", "neither a folder nor a whole"),
    ],
)
def test_without_a_converter_the_error_names_the_flag(tmp_path, given, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b no archive")
    with pytest.raises(ValueError, match=problem):
        find_converter(given and str(tmp_path / given), tmp_path / "scratch")


def test_without_xllamacpp_the_error_comes_before_any_work(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ValueError, match=r"pip install xllamacpp"):
        export_gguf(trained("qwen2"), str(tmp_path / "gguf"))
    assert list(tmp_path.iterdir()) == []


def test_without_llama_quantize_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"build llama\.cpp for its llama-quantize"):
        find_quantiser(tmp_path)


def test_llama_quantize_of_the_named_folder_is_called(tmp_path):
    program = tmp_path / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2" || { echo "bad type" >&2; exit 1; }\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "f16.gguf").write_bytes(b"GGUF")
    find_quantiser(tmp_path)(tmp_path / "f16.gguf", tmp_path / "q4.gguf")
    assert (tmp_path / "q4.gguf").read_bytes() == b"GGUF"
    with pytest.raises(ValueError, match=r"llama-quantize stopped: "):
        find_quantiser(tmp_path)(tmp_path / "missing.gguf", tmp_path / "other.gguf")
