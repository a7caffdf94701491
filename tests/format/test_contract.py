"""Train = serve with tools and thoughts, and on a folder that was saved; which format `auto` takes."""

import json

import pytest
from transformers import AutoTokenizer

from sft.format.contract import check_contract, check_saved, pick_conversations, probe_tool_conversations
from sft.format.render import Renderer

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.fixture
def saved(tiny_base, tmp_path):
    """A ChatML renderer, and a folder as train.py saves it; `run.json` and template may be changed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("qwen2"))
    renderer = Renderer(tokenizer, "chatml")
    renderer.thinking = False
    tokenizer.chat_template = renderer.chat_template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(renderer.describe()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": renderer.stop_ids}))
    return renderer, tmp_path


def problems_of(saved, conversations=()) -> list[str]:
    renderer, folder = saved
    return check_saved(AutoTokenizer.from_pretrained(folder), renderer, conversations)


def test_a_folder_saved_as_it_was_trained_has_no_problem(saved):
    assert problems_of(saved, list(probe_tool_conversations())) == []


def test_a_template_that_changed_on_the_way_to_the_disk_is_named(saved):
    path = saved[1] / "chat_template.jinja"
    path.write_text(path.read_text() + "{# later #}")
    assert problems_of(saved) == ["its chat template differs"]


def test_a_run_json_without_the_default_of_thoughts_is_named(saved):
    (saved[1] / "run.json").write_text(json.dumps({"chat_format": "chatml"}))
    assert problems_of(saved) == ["thinking differs"]


def test_a_generation_config_without_a_stop_token_is_named(saved):
    renderer, folder = saved
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": renderer.tokenizer.eos_token_id}))
    assert problems_of(saved) == ["generation_config.json lacks a stop token"]


def test_a_tokenizer_that_splits_otherwise_gives_other_ids(saved):
    folder = saved[1]
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = spec["model"]["merges"][1:]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert "it gives other ids or labels than training did" in problems_of(saved)


def test_a_conversation_whose_tools_are_rendered_otherwise_than_served_is_found(saved, monkeypatch):
    renderer = saved[0]
    probes = list(probe_tool_conversations())
    assert check_contract(renderer, probes) == []
    monkeypatch.setattr(renderer._own, "prompt", lambda messages, tools, thinking: "<|im_start|>assistant\n")
    assert any("gives other ids than training does" in problem for problem in check_contract(renderer, probes))


def test_conversations_of_each_kind_are_picked_from_a_file(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    thought = {**ASSISTANT, "reasoning_content": "t"}
    records = [{"messages": [USER, ASSISTANT]}] * 9 + [
        {"messages": [USER, called], "tools": tools},
        {"messages": [USER, thought]},
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]},
        {"nothing": 1},
    ]
    path = tmp_path / "train.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    picked = [conversation["messages"] for conversation in pick_conversations([str(path)], 2)]
    assert [len(messages) for messages in picked] == [2, 2, 2, 2, 5]
    assert picked[2][1]["tool_calls"] == [call]
    assert picked[3][1]["reasoning_content"] == "t"
