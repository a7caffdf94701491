"""The comparison with llama.cpp reports each kind of difference."""

import pytest

from sft.chat.reply import load_chat
from sft.export import gguf_check
from sft.export.gguf import export_gguf
from sft.export.gguf_check import compare_with_llama_cpp
from sft.format.render import Renderer
from tests.conftest import CONVERTERS, needs_llama_cpp

pytestmark = [pytest.mark.slow, needs_llama_cpp]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A GGUF in chatml, and the model that it was made from."""
    folder = tmp_path_factory.mktemp("exported") / "gguf"
    export_gguf(trained("qwen2", "chatml"), str(folder), llama_cpp=str(CONVERTERS[-1]))
    return folder / "model-f16.gguf", load_chat(trained("qwen2", "chatml"), device="cpu", dtype="float32")


def test_a_file_that_is_no_gguf_is_refused(exported, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match=r"llama\.cpp can't load the file"):
        compare_with_llama_cpp(exported[1], tmp_path / "no.gguf", "f16")


def test_another_template_and_another_stop_token_are_named(exported, monkeypatch):
    path, chat = exported
    monkeypatch.setattr(chat, "renderer", Renderer(chat.renderer.tokenizer, "blossom"))
    monkeypatch.setattr(chat.renderer, "stop_ids", [chat.renderer.tokenizer.convert_tokens_to_ids("a")])
    with pytest.raises(ValueError, match=r"another chat template; the token 'a' does not end a reply in llama\.cpp"):
        compare_with_llama_cpp(chat, path, "f16")


def test_a_prompt_that_llama_cpp_renders_in_another_way_is_named(exported, monkeypatch):
    path, chat = exported
    rendered = gguf_check.LlamaServer.render

    def render_without_spaces(self, messages, tools, variables) -> str:
        text = rendered(self, messages, tools, variables)
        return text.replace('": ', '":') if tools else text

    monkeypatch.setattr(gguf_check.LlamaServer, "render", render_without_spaces)
    with pytest.raises(ValueError, match=r"llama\.cpp renders a conversation of 1 messages with tools"):
        compare_with_llama_cpp(chat, path, "f16")


def test_another_tokenizer_is_named_by_the_first_text(exported, tokenizer_of, monkeypatch):
    path, chat = exported
    monkeypatch.setattr(chat, "renderer", Renderer(tokenizer_of("bloom"), "blossom"))
    with pytest.raises(ValueError, match="other ids for '你好，世界！"):
        compare_with_llama_cpp(chat, path, "f16")


def test_too_few_equal_tokens_are_an_error(exported, monkeypatch):
    path, chat = exported
    monkeypatch.setattr(gguf_check, "count_equal_tokens", lambda *_arguments: (90, 4, 100))
    with pytest.raises(ValueError, match=r"q8_0: only 90 of 100 greedy tokens equal .*; at least 95% must be"):
        compare_with_llama_cpp(chat, path, "q8_0")
    assert "90 of 100 greedy tokens equal in llama.cpp and transformers, 4 more tied" in compare_with_llama_cpp(
        chat, path, "q4_k_m"
    )
