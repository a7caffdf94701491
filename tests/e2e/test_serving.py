"""Real OpenAI-compatible servers render messages to the ids of training and give the greedy replies of sft.chat."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch

from sft.chat.reply import load_chat
from sft.chat.sampling import GREEDY
from sft.export.gguf import export_gguf
from sft.export.gguf_check import LlamaServer
from sft.format.render import Renderer
from sft.model.load import load_model, load_tokenizer, set_generation_config
from tests.conftest import CONVERTERS, needs_llama_cpp
from tests.e2e.vllm_server import VllmServer, free_port, needs_vllm, post
from tests.families import build_tiny

pytestmark = pytest.mark.slow

LEARNED = (
    [("user", "你好"), ("assistant", "你好！有什么可以帮你？"), ("user", "再见"), ("assistant", "再见 😀")],
    [("system", "Be brief."), ("user", "1+1=?"), ("assistant", "**2**, `two`.")],
)
GREEDILY = {"temperature": 0, "max_tokens": 40}

# The real command, which prints the prompt's ids of each generation on stdout.
SERVE = """
import json, sys
from transformers import GenerationMixin
generate = GenerationMixin.generate
def generate_and_print(self, *arguments, **options):
    print(json.dumps(options["input_ids"].tolist()), flush=True)
    return generate(self, *arguments, **options)
GenerationMixin.generate = generate_and_print
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", *sys.argv[1:]]
main()
"""


def conversations() -> list[list[dict]]:
    return [[{"role": role, "content": text} for role, text in turns] for turns in LEARNED]


def prompts() -> list[list[dict]]:
    """Each learned conversation up to each reply."""
    return [
        messages[:index]
        for messages in conversations()
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@pytest.fixture(scope="module", params=[("qwen2", "chatml"), ("mistral", "blossom")], ids="-".join)
def learned(request, tiny_base, tmp_path_factory):
    """A folder as train.py saves it, of a model that has memorised the conversations; and its chat."""
    family, chat_format = request.param
    folder = tmp_path_factory.mktemp("learned") / family
    learn(tiny_base(family), folder, chat_format)
    return folder, load_chat(str(folder), device="cpu", dtype="float32")


def learn(base, folder, chat_format: str) -> None:
    """Train `base` on the conversations and save it as train.py does."""
    tokenizer = load_tokenizer(str(base))
    renderer = Renderer(tokenizer, chat_format)
    tokenizer.chat_template = renderer.chat_template
    torch.manual_seed(0)
    model = load_model(str(base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for messages in conversations():
            row = renderer.render(messages)
            ids, labels = (torch.tensor(values).long()[None] for values in row[:2])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.config.use_cache = True
    set_generation_config(model, tokenizer, renderer.stop_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def expected_reply(chat, messages: list[dict]) -> str:
    reply = chat.reply(messages, replace(GREEDY, max_new_tokens=40))
    assert reply.ended
    return reply.text


def test_the_model_has_learned_its_conversations(learned):
    _folder, chat = learned
    assert [expected_reply(chat, messages) for messages in prompts()] == [
        "你好！有什么可以帮你？",
        "再见 😀",
        "**2**, `two`.",
    ]


@pytest.fixture
def transformers_serve():
    """`transformers serve` as a process; gives its address and a function that waits for the next prompt's ids."""
    port = free_port()
    command = [sys.executable, "-c", SERVE, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, "transformers serve has ended"
                    time.sleep(0.1)
            lines = (json.loads(line) for line in server.stdout if line.startswith(b"[["))  # others are its access log
            yield f"http://127.0.0.1:{port}/v1/chat/completions", lambda: next(lines)
        finally:
            server.terminate()


def test_transformers_serve_starts_from_the_ids_of_training(learned, transformers_serve):
    folder, chat = learned
    url, next_ids = transformers_serve
    for messages in prompts():
        answer = post(url, {"model": str(folder), "messages": messages, **GREEDILY})
        assert next_ids() == [chat.renderer.prompt(messages)]
        assert answer["usage"]["prompt_tokens"] == len(chat.renderer.prompt(messages))
        assert answer["choices"][0]["message"]["content"].strip() == expected_reply(chat, messages)
        assert answer["choices"][0]["finish_reason"] == "stop"


@needs_llama_cpp
def test_llama_cpps_server_starts_from_the_ids_of_training(learned, tmp_path):
    folder, chat = learned
    found = export_gguf(str(folder), str(tmp_path / "gguf"), outtype="f16", llama_cpp=str(CONVERTERS[-1]))
    assert found.startswith("f16: ")
    server = LlamaServer(tmp_path / "gguf" / "model-f16.gguf", 512)
    try:
        for messages in prompts():
            text = post(f"{server.url}/apply-template", {"messages": messages})["prompt"]
            assert server.tokenize(text) == chat.renderer.prompt(messages)
            answer = post(f"{server.url}/v1/chat/completions", {"messages": messages, **GREEDILY})
            assert answer["usage"]["prompt_tokens"] == len(chat.renderer.prompt(messages))
            assert answer["choices"][0]["message"]["content"].strip() == expected_reply(chat, messages)
            assert answer["choices"][0]["finish_reason"] == "stop"
    finally:
        server.close()


@needs_vllm
def test_vllm_starts_from_the_ids_of_training(tmp_path):
    base = build_tiny("qwen3", tmp_path / "base", hidden_size=128, num_layers=2)  # vLLM has no kernel for heads of 16
    learn(base, tmp_path / "model", "chatml")
    chat = load_chat(str(tmp_path / "model"), device="cpu", dtype="float32")
    with VllmServer(tmp_path / "model") as server:
        for messages in prompts():
            answer = server.chat(messages)
            assert answer["prompt_token_ids"] == chat.renderer.prompt(messages)
            [choice] = answer["choices"]
            assert choice["message"]["content"].strip() == expected_reply(chat, messages)
            assert choice["finish_reason"] == "stop"
