"""A real small chat model from data to servers: it learns a name, keeps its knowledge, and servers give its replies."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sft.chat.reply import Chat, load_chat
from sft.chat.sampling import GREEDY
from sft.export.gguf import export_gguf
from sft.export.gguf_check import LlamaServer
from sft.export.merge import export_merged
from tests.conftest import CONVERTERS, ROOT, needs_llama_cpp
from tests.e2e.vllm_server import VllmServer, needs_vllm, post

pytestmark = pytest.mark.slow

# As docs/real-model.md shows it, but for the replies before and after the training.
TRAIN = """train.py --model_name_or_path {base} --output_dir {run} --chat_format base --lora --learning_rate 1e-3
    --data_path data_proj/identity/identity.jsonl@4x data_proj/identity/general.jsonl --num_train_epochs 3
    --max_length 512 --per_device_train_batch_size 2 --logging_steps 1 --use_cpu
    --num_reply_prompts 0 --max_new_tokens 2"""
NAME = [{"role": "user", "content": "Please say your name."}]  # not a question of the data
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
TURNS = [*NAME, {"role": "assistant", "content": "My name is Robin."}, *CAPITAL]
SHORT = replace(GREEDY, max_new_tokens=40)


@pytest.fixture(scope="module")
def run(real_base, tmp_path_factory) -> Path:
    """The adapter after three epochs of the identity set beside general conversations."""
    folder = tmp_path_factory.mktemp("real") / "run"
    words = TRAIN.format(base=real_base, run=folder).split()
    environment = {**os.environ, "OMP_NUM_THREADS": str(min(2, os.cpu_count()))}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def merged(run) -> tuple[Path, Chat]:
    folder = export_merged(str(run), str(run.parent / "merged"), dtype="bfloat16")
    return folder, load_chat(str(folder), device="cpu", dtype="float32")


def replies(chat: Chat) -> list[str]:
    return [reply.text for reply in chat.reply_batch([NAME, CAPITAL, TURNS], SHORT)]


def test_it_learns_its_name_and_keeps_what_it_knew(real_base, merged):
    before = replies(load_chat(str(real_base), device="cpu", dtype="float32"))
    after = replies(merged[1])
    assert "Robin" not in before[0] and "Robin" in after[0]
    assert "Paris" in before[1] and "Paris" in after[1] and "Paris" in after[2]
    assert all(reply.ended for reply in merged[1].reply_batch([NAME, CAPITAL, TURNS], SHORT))


def test_the_template_and_its_default_system_line_are_the_bases(real_base, run, merged):
    template = (real_base / "chat_template.jinja").read_bytes()
    assert (run / "chat_template.jinja").read_bytes() == (merged[0] / "chat_template.jinja").read_bytes() == template
    assert (
        merged[1]
        .renderer.text(NAME)
        .startswith(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        )
    )
    record = json.loads((run / "run.json").read_text())
    assert [row[:4] for row in record["mixture"][1:]] == [
        ["data_proj/identity/identity.jsonl", "14", "4", "56"],
        ["data_proj/identity/general.jsonl", "20", "1", "20"],
    ]


@needs_llama_cpp
def test_llama_cpp_gives_the_same_replies(merged, tmp_path):
    folder, chat = merged
    result = export_gguf(str(folder), str(tmp_path / "gguf"), outtype="bf16", llama_cpp=str(CONVERTERS[-1]))
    assert result.startswith("bf16: 12 texts and 8 prompts give the same ids; ")
    server = LlamaServer(tmp_path / "gguf" / "model-bf16.gguf", 512)
    try:
        for messages, expected in zip((NAME, CAPITAL, TURNS), replies(chat), strict=True):
            text = post(f"{server.url}/apply-template", {"messages": messages})["prompt"]
            assert server.tokenize(text) == chat.renderer.prompt(messages)
            body = {"messages": messages, "temperature": 0, "max_tokens": 40}
            [choice] = post(f"{server.url}/v1/chat/completions", body)["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    finally:
        server.close()


@needs_vllm
def test_vllm_gives_the_same_replies(merged):
    folder, chat = merged
    with VllmServer(folder) as server:
        for messages, expected in zip((NAME, CAPITAL, TURNS), replies(chat), strict=True):
            answer = server.chat(messages)
            assert answer["prompt_token_ids"] == chat.renderer.prompt(messages)
            [choice] = answer["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
