"""Load a GGUF in llama.cpp and compare it with the model in transformers.

Token ids, stop ids and the chat template must be equal. Greedy tokens must be equal but for ties, or, in a quantised
file, for a share of them.
"""

import json
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from sft.chat.reply import Chat
from sft.format.table import is_bos_added

# The smallest share of tokens of transformers' greedy replies that llama.cpp must choose too. Quantised weights are
# another model; below these shares it no longer resembles the trained one.
MIN_AGREEMENT = {"f32": 1.0, "f16": 1.0, "bf16": 1.0, "q8_0": 0.95, "q4_k_m": 0.8}
# Two tokens are tied when their logits are closer than this share of the standard deviation of all logits: llama.cpp
# computes GELU from a table of fp16 numbers, and logits came out 0.003 of it apart (dev/LOG.md).
MAX_TIE = {"f32": 0.01, "f16": 0.01, "bf16": 0.05, "q8_0": 0.05, "q4_k_m": 0.05}
NUM_NEW_TOKENS = 24
SPARE_TOKENS = 8  # of context, beyond prompt and reply

# Conversations are texts, the user's first.
_PROBES = json.loads(Path(__file__).with_name("probes.json").read_text(encoding="utf-8"))
TEXTS = _PROBES["texts"]
CONVERSATIONS = _PROBES["conversations"]
TOOLS = _PROBES["tools"]


def messages_of(texts: Sequence[str], system: str | None = None) -> list[dict]:
    """Turn texts, the user's first, into messages."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


# --- llama.cpp ----------------------------------------------------------------------------------------------------


def check_library() -> None:
    """Raise ValueError when xllamacpp is missing."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        raise ValueError("--to gguf checks the file in llama.cpp: pip install xllamacpp (no compiler needed)") from None


class LlamaServer:
    """A GGUF in llama.cpp's server, which the package xllamacpp runs in this process on a free local port.

    `context` is its context length in tokens. Close it after use.
    """

    def __init__(self, path: Path, context: int):
        import torch
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.no_extra_bufts = True  # on a CPU with AMX, repacked weights give other logits
        settings.fit_params = False
        settings.warmup = False
        settings.verbosity = -1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # llama.cpp's idle threads spin: more threads than torch's would take most of a busy machine's time.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.port = 0
        settings.endpoint_props = True
        self._server = xllamacpp.Server(settings)
        self.url = self._server.listening_address
        self.template = self._request("/props")["chat_template"]

    def _request(self, route: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text with control tokens in it, behind a bos if the file asks for one."""
        return self._request("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def render(self, messages: Sequence[dict], tools: Sequence[dict] | None, variables: dict) -> str:
        """Return the prompt's text, by the template in the file and llama.cpp's own Jinja engine."""
        body = {"messages": messages, "chat_template_kwargs": variables} | ({"tools": tools} if tools else {})
        return self._request("/apply-template", body)["prompt"]

    def next_token(self, ids: Sequence[int]) -> int:
        """Return the likeliest token after `ids`."""
        return self._complete(ids)["tokens"][0]

    def ends_reply(self, token_id: int) -> bool:
        """Whether generation stops at this token."""
        return self._complete([token_id], logit_bias=[[token_id, 1e9]], n_predict=2)["stop_type"] == "eos"

    def _complete(self, ids: Sequence[int], **options) -> dict:
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "return_tokens": True, **options}
        return self._request("/completion", body)

    def close(self) -> None:
        del self._server


# --- the comparison -----------------------------------------------------------------------------------------------


def compare_with_llama_cpp(chat: Chat, path: Path, outtype: str) -> str:
    """Compare a GGUF with the model that `chat` has loaded in fp32; return the result in a line.

    Raises ValueError that names the differences.
    """
    prompts = [chat.renderer.prompt(messages) for messages in _conversations(chat)]
    context = max(map(len, prompts)) + NUM_NEW_TOKENS + SPARE_TOKENS
    try:
        server = LlamaServer(path, context)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"llama.cpp can't load the file: {error}") from None
    with closing(server):
        problems = [
            *_find_other_ids(chat, server, prompts),
            *_find_other_ends(chat, server),
            *_find_other_prompts(chat, server),
        ]
        if problems:
            raise ValueError(f"llama.cpp and transformers read the model differently: {'; '.join(problems[:3])}")
        equal, tied, total = count_equal_tokens(chat, server, prompts, MAX_TIE[outtype])
    result = f"{equal} of {total} greedy tokens equal in llama.cpp and transformers, {tied} more tied"
    if (equal + tied) / total < MIN_AGREEMENT[outtype]:
        raise ValueError(f"{outtype}: only {result}; at least {MIN_AGREEMENT[outtype]:.0%} must be")
    return f"{outtype}: {len(TEXTS)} texts and {len(prompts)} prompts give the same ids; {result}"


def _conversations(chat: Chat) -> Iterable[list[dict]]:
    for system in (None, "Be brief. 用中文回答。"):
        for texts in CONVERSATIONS:
            if not system or "system" in (chat.renderer.chat_template or ""):
                yield messages_of(texts, system)


def _find_other_ids(chat: Chat, server: LlamaServer, prompts: list[list[int]]) -> Iterable[str]:
    """Compare ids of plain texts, of each added token, and of conversations rendered by the saved template."""
    tokenizer = chat.renderer.tokenizer
    for text in TEXTS:
        if server.tokenize(text) != tokenizer(text)["input_ids"]:
            yield f"other ids for {text!r}"
    num_rows = chat.model.config.get_text_config().vocab_size
    bos = tokenizer.bos_token if is_bos_added(tokenizer) else ""
    for token, token_id in tokenizer.get_added_vocab().items():
        if token != bos and token_id < num_rows and server.tokenize(token)[-1:] != [token_id]:
            yield f"{token!r} is not one token in llama.cpp"
    for messages, prompt in zip(_conversations(chat), prompts, strict=True):
        if server.tokenize(chat.renderer.text(messages).removeprefix(bos)) != prompt:
            yield f"other ids for a rendered conversation of {len(messages)} messages"


def _find_other_prompts(chat: Chat, server: LlamaServer) -> Iterable[str]:
    """Compare the prompts that the server renders itself; one with today's date differs every day."""
    if chat.renderer.writes_date:
        return
    renderer = chat.renderer
    for tools in (None, TOOLS) if renderer.can_use_tools else (None,):
        for messages in _conversations(chat):
            text = server.render(messages, tools, renderer.template_kwargs)
            if server.tokenize(text) != renderer.prompt(messages, tools=tools):
                kind = " with tools" if tools else ""
                yield f"llama.cpp renders a conversation of {len(messages)} messages{kind} to another prompt"


def _find_other_ends(chat: Chat, server: LlamaServer) -> Iterable[str]:
    if server.template != chat.renderer.chat_template:
        yield "another chat template"
    for stop_id in chat.renderer.stop_ids:
        if not server.ends_reply(stop_id):
            token = chat.renderer.tokenizer.convert_ids_to_tokens(stop_id)
            yield f"the token {token!r} does not end a reply in llama.cpp"


def count_equal_tokens(
    chat: Chat, server: LlamaServer, prompts: list[list[int]], max_tie: float
) -> tuple[int, int, int]:
    """Count the tokens of transformers' greedy replies: equal in llama.cpp, tied, all.

    llama.cpp computes one token after each prefix of a reply. If all are equal, its own greedy reply is the same; after
    a different one, the tokens after it still count.
    """
    import torch
    from transformers import GenerationConfig

    ends = {"eos_token_id": chat.renderer.stop_ids, "pad_token_id": chat.renderer.tokenizer.pad_token_id}
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=NUM_NEW_TOKENS, **ends)
    equal = tied = total = 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            row = chat.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            logits = chat.model(input_ids=row).logits[0, len(prompt) - 1 : -1]
        for length, scores in enumerate(logits, start=len(prompt)):
            theirs = server.next_token(row[0, :length].tolist())
            best = int(scores.argmax())
            is_close = theirs < len(scores) and bool(scores[best] - scores[theirs] <= max_tie * scores.std())
            equal += theirs == best
            tied += theirs != best and is_close
            total += 1
    return equal, tied, total
