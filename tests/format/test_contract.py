"""Train = serve with tools and thoughts, and on a folder that was saved; which format `auto` takes."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sft.embeddings import find_untrained
from sft.format.contract import (
    check_contract,
    check_saved,
    check_variables,
    choose_format,
    pick_conversations,
    probe_tool_conversations,
)
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


@pytest.mark.parametrize("chat_format", ["blossom", "chatml", "alpaca", "base"])
def test_a_renderer_that_trains_the_last_reply_alone_has_no_problem(chat_format, tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2"))
    tokenizer.chat_template = Renderer(tokenizer, "chatml").chat_template
    renderer = Renderer(tokenizer, chat_format, train_turns="last")
    assert check_contract(renderer, [[USER, ASSISTANT, USER, ASSISTANT]]) == []


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
    monkeypatch.setattr(renderer._own, "prompt", lambda messages, tools, thinking, variables: "<|im_start|>assistant\n")
    assert any("gives other ids than training does" in problem for problem in check_contract(renderer, probes))


# --- the choice of `auto` -----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chosen(tiny_base, tmp_path):
    """Return a function that changes a tiny Qwen's embedding rows and returns what `auto` chooses."""

    def choose(change=None, eos: str = "<|endoftext|>", kind=torch.bfloat16) -> tuple[str, str]:
        folder = tmp_path / "base"
        shutil.copytree(tiny_base("qwen2"), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        weights = load_file(folder / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, eos_token=eos)
        if change:
            ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            change(weights["model.embed_tokens.weight"], ids, len(tokenizer))
        save_file({name: weight.to(kind) for name, weight in weights.items()}, folder / "model.safetensors")
        return choose_format("auto", tokenizer)

    return choose


def zero(rows, ids, _size):
    rows[ids[1]] = 0


def shrink(rows, ids, _size):
    rows[ids] *= 0.01


def make_alike(rows, ids, _size):
    rows[ids[0]] = rows[ids[1]] * 1.01


def make_like_the_rows_of_no_token(rows, ids, size):
    rows[[*ids[:1], *range(size, len(rows))]] = rows[7].clone()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (zero, "<|im_end|>, whose embedding row was"),
        (shrink, "<|im_start|>, <|im_end|>, whose embedding rows were"),
        (make_alike, "<|im_start|>, <|im_end|>, whose embedding rows were"),
        (make_like_the_rows_of_no_token, "<|im_start|>, whose embedding row was"),
    ],
)
def test_auto_leaves_an_own_template_whose_control_tokens_were_never_trained(change, named, chosen):
    name, reason = chosen(change, eos="<|im_end|>")
    assert name == ("chatml" if change is make_like_the_rows_of_no_token else "blossom")
    assert f"its own template writes {named} never trained" in reason


def test_auto_takes_it_where_only_the_rows_of_no_token_are_untrained(chosen):
    def zero_the_rest(rows, _ids, size):
        rows[size:] = 0

    assert chosen(zero_the_rest) == (
        "base",
        "the model's own template passes the checks, and the embedding rows of <|im_start|>, <|im_end|> are trained",
    )


def test_auto_says_that_it_did_not_look_at_rows_that_are_not_here(chosen, tmp_path):
    chosen()
    (tmp_path / "base" / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base", eos_token="<|im_end|>")
    name, reason = choose_format("auto", tokenizer)
    assert name == "base"
    assert reason.endswith("<|im_end|>; its embedding rows were not looked at, as they are not here")


def test_auto_reads_the_stop_tokens_of_a_model_in_the_hubs_cache(chosen, tmp_path, monkeypatch):
    """Gemma's eos is <eos>; only its generation_config.json says that replies end in <end_of_turn>."""
    chosen()
    commit = "0" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(tmp_path / "base", snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    tokenizer = AutoTokenizer.from_pretrained(snapshot, eos_token="<|endoftext|>")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokenizer.name_or_path = "owner/name"
    stop_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop_id]}))
    assert choose_format("auto", tokenizer)[0] == "base"
    (snapshot / "generation_config.json").unlink()
    assert choose_format("auto", tokenizer)[0] == "blossom"


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_rows_are_read_in_each_precision_and_a_cut_file_counts_as_none(kind, chosen, tmp_path):
    name, reason = chosen(zero, eos="<|im_end|>", kind=kind)
    assert (name, "never trained" in reason) == ("blossom", True)
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    assert find_untrained(str(path.parent), [5, 6], num_tokens=2000) is None


def test_variables_that_a_template_does_not_read_are_named(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("qwen2"))
    plain = Renderer(tokenizer, "chatml").chat_template
    tokenizer.chat_template = "{% if not effort is defined %}{% set effort = 'low' %}{% endif %}{{ effort }}" + plain
    renderer = Renderer(tokenizer, "base", template_kwargs={"effort": "high"})
    check_variables(renderer, {"effort": "high"})
    with pytest.raises(ValueError, match=r"chat format 'base' doesn't read efort, messages; it reads effort$"):
        check_variables(renderer, {"efort": "high", "messages": [], "effort": "high"})
    for chat_format in ("chatml", "blossom"):
        check_variables(Renderer(tokenizer, chat_format), None)
        with pytest.raises(ValueError, match=f"chat format '{chat_format}' doesn't read effort; it has none; leave it"):
            check_variables(Renderer(tokenizer, chat_format), {"effort": "high"})


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
