"""Real OpenAI-compatible servers render messages to the ids of training and give the greedy replies of sft.chat."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sft.chat.reply import load_chat
from sft.chat.sampling import GREEDY
from sft.export.gguf import export_gguf
from sft.export.gguf_check import LlamaServer
from sft.format.render import Renderer
from sft.model.load import load_model, load_tokenizer, set_generation_config
from tests.conftest import CONVERTERS, ROOT, needs_llama_cpp, skip_unless_ci
from tests.e2e.vllm_server import VllmServer, free_port, needs_vllm, post
from tests.families import build_tiny

pytestmark = pytest.mark.slow

LEARNED = (
    [("user", "你好"), ("assistant", "你好！有什么可以帮你？"), ("user", "再见"), ("assistant", "再见 😀")],
    [("system", "Be brief."), ("user", "1+1=?"), ("assistant", "**2**, `two`.")],
)
TEMPLATES = sorted((ROOT / ".cache").glob("trl-1.16.0-*.whl"))
MAX_NEW_TOKENS = 120
MAX_EPOCHS = 150
MEMORISED_LOSS = 0.01
GREEDILY = {"temperature": 0, "max_tokens": MAX_NEW_TOKENS}

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
    learn(tiny_base(family), folder, chat_format, [{"messages": messages} for messages in conversations()])
    return folder, load_chat(str(folder), device="cpu", dtype="float32")


def learn(base: Path, folder: Path, chat_format: str, rows: list[dict], template: str | None = None) -> None:
    """Train `base` on conversations until it has memorised them, and save it as train.py does."""
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, chat_format)
    tokenizer.chat_template = renderer.chat_template
    torch.manual_seed(0)
    model = load_model(str(base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    examples = [row for conversation in rows for row in renderer.render_conversation(**conversation)]
    losses = [1.0]
    for _epoch in range(MAX_EPOCHS):
        if max(losses) < MEMORISED_LOSS:
            break
        losses = [take_step(model, optimizer, example) for example in examples]
    model.config.use_cache = True
    set_generation_config(model, tokenizer, renderer.stop_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take_step(model, optimizer, example) -> float:
    """Take a training step on one row; return its loss before the step."""
    ids, labels = (torch.tensor(values).long()[None] for values in example[:2])
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def expected_reply(chat, messages: list[dict]) -> str:
    reply = chat.reply(messages, replace(GREEDY, max_new_tokens=MAX_NEW_TOKENS))
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


# --- tools and thoughts, in the template of Qwen3 -----------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "巴黎"}}}
WEATHER = [
    {"role": "user", "content": "巴黎的天气？"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": 18}', "tool_call_id": "call00001"},
    {"role": "assistant", "content": "18 度。"},
]
SUM = [
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2", "reasoning_content": "One and one make two."},
]
GREETING = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！有什么可以帮你？"}]


class Request(NamedTuple):
    """A prompt, the thinking switch, and the learned reply: thought, text, arguments of its call."""

    messages: list[dict]
    tools: list[dict] | None
    thinking: bool
    thought: str | None
    content: str
    arguments: dict | None = None

    def body(self) -> dict:
        """Return it as OpenAI's clients send it, with arguments as JSON text."""
        messages = json.loads(json.dumps(self.messages))
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": self.thinking}}
        return body | ({"tools": self.tools} if self.tools else {})


REQUESTS = {
    "thinking off": Request(GREETING[:1], None, False, None, "你好！有什么可以帮你？"),
    "thinking on": Request(SUM[:1], None, True, "One and one make two.", "2"),
    "tools": Request(WEATHER[:1], [TOOL], False, None, "", {"city": "巴黎"}),
    "result of a tool": Request(WEATHER[:3], [TOOL], False, None, "18 度。"),
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """A model that has memorised a call, its answer, a thought and a plain reply; its folder and its chat."""
    if not TEMPLATES:
        skip_unless_ci("needs Qwen3's template: pip download --no-deps trl==1.16.0 -d .cache")
    folder = tmp_path_factory.mktemp("agent")
    base = build_tiny("qwen3", folder / "base", hidden_size=128, num_layers=2)  # vLLM has no kernel for heads of 16
    with zipfile.ZipFile(TEMPLATES[-1]) as archive:
        template = archive.read("trl/chat_templates/qwen3.jinja").decode()
    rows = [{"messages": WEATHER, "tools": [TOOL]}, {"messages": SUM}, {"messages": GREETING}]
    learn(base, folder / "model", "base", rows, template)
    return folder / "model", load_chat(str(folder / "model"), device="cpu", dtype="float32")


def prompt_of(chat, request: Request) -> list[int]:
    return chat.renderer.prompt(request.messages, tools=request.tools, thinking=request.thinking)


@pytest.mark.parametrize("name", REQUESTS)
def test_sft_chat_gives_the_thought_the_text_and_the_call(agent, name):
    request, (_folder, chat) = REQUESTS[name], agent
    chat = replace(chat, tools=request.tools, thinking=request.thinking)
    reply = chat.reply(request.messages, replace(GREEDY, max_new_tokens=MAX_NEW_TOKENS))
    calls = reply.message.get("tool_calls", [])
    assert reply.ended
    assert (reply.message.get("reasoning_content"), reply.message["content"]) == (request.thought, request.content)
    assert [call["function"]["arguments"] for call in calls] == ([request.arguments] if request.arguments else [])


def test_transformers_serve_starts_from_the_same_ids_with_tools_and_thoughts(agent, transformers_serve):
    folder, chat = agent
    url, next_ids = transformers_serve
    for request in REQUESTS.values():
        post(url, {"model": str(folder), **request.body(), **GREEDILY})
        assert next_ids() == [prompt_of(chat, request)]


@needs_llama_cpp
def test_llama_cpps_server_starts_from_the_same_ids_with_tools_and_thoughts(agent, tmp_path):
    folder, chat = agent
    export_gguf(str(folder), str(tmp_path / "gguf"), outtype="f16", llama_cpp=str(CONVERTERS[-1]))
    server = LlamaServer(tmp_path / "gguf" / "model-f16.gguf", 512)
    try:
        for request in REQUESTS.values():
            text = post(f"{server.url}/apply-template", request.body())["prompt"]
            assert server.tokenize(text) == prompt_of(chat, request)
            [choice] = post(f"{server.url}/v1/chat/completions", request.body() | GREEDILY)["choices"]
            check_message(choice["message"], request, thought="reasoning_content")
    finally:
        server.close()


@needs_vllm
def test_vllm_starts_from_the_same_ids_and_parses_the_call_and_the_thought(agent):
    folder, chat = agent
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    with VllmServer(folder, *flags, "--trust-request-chat-template") as server:
        for request in REQUESTS.values():
            answer = server.chat(**request.body(), max_tokens=MAX_NEW_TOKENS)
            assert answer["prompt_token_ids"] == prompt_of(chat, request)
            [choice] = answer["choices"]
            check_message(choice["message"], request, thought="reasoning")
            assert choice["finish_reason"] == ("tool_calls" if request.arguments else "stop")
        # The template that chatml saves: without a switch, and thoughts only in replies.
        chatml = Renderer(load_tokenizer(str(folder)), "chatml")
        for request in REQUESTS.values():
            answer = server.chat(**request.body(), chat_template=chatml.chat_template, max_tokens=1)
            assert answer["prompt_token_ids"] == chatml.prompt(request.messages, tools=request.tools)


def check_message(message: dict, request: Request, *, thought: str) -> None:
    """Compare a server's message with the learned reply; `thought` is the server's name of the field."""
    assert ((message.get(thought) or "").strip() or None) == request.thought
    assert (message["content"] or "").strip() == request.content
    calls = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    assert calls == ([request.arguments] if request.arguments else [])
