"""Chat: a loaded checkpoint that replies. Load it once, then call `reply`, `stream_reply` or `reply_batch`.

Prompts come from the renderer of the training rows, so the model reads the same tokens here as in training.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft.base import ADAPTER, CONFIG, RUN_RECORD, base_of_adapter, check_base
from sft.chat.batching import Decoder
from sft.chat.rows import Request
from sft.chat.sampling import BLOSSOM, Sampling
from sft.chat.token_probabilities import Piece, score_tokens
from sft.format.table import FORMAT_NAMES
from sft.format.tokens import HALF_CHARACTER
from sft.model.load import (
    DTYPES,
    PASSIVE_OPENMP_WAIT,
    check_model_path,
    check_weights,
    context_window,
    four_bit,
    from_pretrained,
    load_tokenizer,
    repair_peft,
)
from sft.opendata.messages import read_tools

if TYPE_CHECKING:
    from sft.format.render import Renderer

PROMPT_END_TOKENS = 16  # that may hold the start of a thought
LONE_END = re.compile(r"</think>[ \t]*(\n|\Z)")
MODEL_FILES = (CONFIG, ADAPTER)  # one of them makes a folder a model

# Messages, or an object with `messages` and the `tools` and `chat_template_kwargs` of this prompt.
Asked = Sequence[dict] | Mapping


class Reply(NamedTuple):
    """The model's text; `ended` says whether it stopped by itself, `num_tokens` counts without the stop token."""

    text: str
    ended: bool
    num_tokens: int
    message: dict | None = None  # role, content, and reasoning_content and tool_calls where the reply has them

    @property
    def answer(self) -> str:
        """Return the text without thought and calls."""
        return self.text if self.message is None else self.message["content"]


@dataclass
class Chat:
    """A loaded model with its renderer; `tools` and `thinking` (the template's switch) go into every prompt."""

    model: object
    renderer: "Renderer"
    tools: Sequence[dict] | None = None
    thinking: bool | None = None

    def reply(self, messages: Sequence[dict], sampling: Sampling = BLOSSOM) -> Reply:
        """Reply to messages that end with the user's turn."""
        return self.reply_batch([messages], sampling)[0]

    def reply_batch(self, batch: Sequence[Sequence[dict]], sampling: Sampling = BLOSSOM) -> list[Reply]:
        """Reply to several conversations together."""
        return [self.to_reply(request.ids, request.prompt) for request in self._decode(batch, sampling)]

    def _decode(self, batch: Sequence[Sequence[dict]], sampling: Sampling) -> list[Request]:
        decoder = self.new_decoder()
        requests = [decoder.add(self.prompt_ids(messages), sampling) for messages in batch]
        decoder.run()
        if failed := [request.error for request in requests if request.error]:
            raise failed[0]
        return requests

    def reply_each(
        self,
        questions: Iterable[tuple[object, Asked]],
        sampling: Sampling = BLOSSOM,
        *,
        at_once: int = 8,
        seed: int = 0,
    ) -> Iterator[tuple[object, Reply]]:
        """Yield (key, reply) for each (key, messages), in the order in which they end, `at_once` together.

        The seed of each reply is made of `seed` and its key: it doesn't depend on the other questions.
        """
        decoder = self.new_decoder()
        left = iter(questions)
        running = {}
        decoder.max_active = at_once
        while True:
            for key, messages in itertools.islice(left, 2 * at_once - len(running)):
                own_seed = int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:15], 16)
                tools = messages.get("tools") if isinstance(messages, Mapping) else None
                running[key] = decoder.add(self.prompt_ids(messages), sampling, seed=own_seed), tools
            if not running:
                return
            decoder.step()
            for key in [key for key, (request, _tools) in running.items() if request.done]:
                request, tools = running.pop(key)
                if request.error:
                    raise request.error
                yield key, self.to_reply(request.ids, request.prompt, tools=tools)

    def reply_with_pieces(self, messages: Sequence[dict], sampling: Sampling = BLOSSOM) -> tuple[Reply, list[Piece]]:
        """Reply, and return the probability of each token; see `sft.chat.token_probabilities`."""
        [request] = self._decode([messages], sampling)
        pieces = score_tokens(self.model, self.renderer.tokenizer, request.prompt, request.ids)
        return self.to_reply(request.ids, request.prompt), pieces

    def stream_reply(
        self, messages: Sequence[dict], sampling: Sampling = BLOSSOM, stop: threading.Event | None = None
    ) -> Iterator[Reply]:
        """Yield the growing reply. Closing the generator, or setting `stop`, ends the computation within a token.

        Streams that are read at the same time, each in its thread, share one batch.
        """
        request = self.decoder.add(self.prompt_ids(messages), sampling, stop=stop)
        self.decoder.start()
        try:
            for count in self.decoder.follow(request):
                yield self.to_reply(request.ids[:count], request.prompt, growing=True)
            yield self.to_reply(request.ids, request.prompt)
        finally:
            request.cancel()
            self.decoder.wait(request)

    @cached_property
    def decoder(self) -> Decoder:
        """The batch that all streams of this chat share."""
        return self.new_decoder()

    def new_decoder(self) -> Decoder:
        pad_id = self.renderer.tokenizer.pad_token_id or 0
        return Decoder(self.model, stop_ids=self.renderer.stop_ids, pad_id=pad_id, window=self.context_window)

    def prompt_ids(self, asked: Asked, *, thinking: bool | None = None) -> list[int]:
        """Render the prompt; raises ValueError when the context window has no room left for a reply."""
        asked = asked if isinstance(asked, Mapping) else {"messages": asked}
        if asked.get("tools") and not self.renderer.can_use_tools:
            raise ValueError(f"chat format {self.renderer.name!r} has no place for tools; use chatml or base")
        prompt = self.renderer.prompt(
            asked["messages"],
            tools=asked.get("tools") or self.tools,
            thinking=self.thinking if thinking is None else thinking,
            variables=asked.get("chat_template_kwargs"),
        )
        window = self.context_window
        if window and len(prompt) + 1 > window:
            raise ValueError(
                f"the conversation has {len(prompt):,} tokens, the model's context window {window:,}; shorten it"
            )
        return prompt

    def history(self, messages: Sequence[dict]) -> list[dict]:
        """Return the messages as the chat format takes them: without thoughts where it has no place for any."""
        if self.renderer.keeps_reasoning:
            return list(messages)
        return [{key: message[key] for key in message if key != "reasoning_content"} for message in messages]

    @property
    def context_window(self) -> int | None:
        """The model's context length in tokens; None where it has no fixed one (ALiBi)."""
        return context_window(self.model.config)

    def to_reply(
        self,
        new_ids: Sequence[int],
        prompt: Sequence[int] = (),
        *,
        growing: bool = False,
        tools: Sequence[dict] | None = None,
    ) -> Reply:
        """Decode generated tokens up to the first stop token; the end of `prompt` may open their thought."""
        stops = [new_ids.index(stop) for stop in self.renderer.stop_ids if stop in new_ids]
        ids = new_ids[: min(stops, default=len(new_ids))]
        text = self.renderer.decode(ids)
        message = self._to_message(ids, text, prompt, tools or self.tools)
        if growing:  # a character of several tokens decodes to U+FFFD until its last token is there
            text = text.rstrip(HALF_CHARACTER)
            message = {
                key: value.rstrip(HALF_CHARACTER) if isinstance(value, str) else value for key, value in message.items()
            }
        return Reply(text, bool(stops), len(ids), message)

    def _to_message(self, ids: Sequence[int], text: str, prompt: Sequence[int], tools) -> dict:
        """Split a reply into thought, calls and text; calls that the chat format has no place for stay text."""
        opened = self.renderer.tokenizer.decode(prompt[-PROMPT_END_TOKENS:], skip_special_tokens=False)
        message = self.renderer.read_reply(ids, opened=opened, tools=tools)
        if message.get("tool_calls") and not self.renderer.can_use_tools:
            return {"role": "assistant", "content": text}
        if not message.get("reasoning_content") and not message.get("tool_calls"):
            return split_thought(text) if message["content"] else {"role": "assistant", "content": ""}
        return message


def split_thought(text: str) -> dict:
    """Return a reply as a message; a thought may have its end alone, if a server's prompt held the start.

    A `</think>` inside a sentence or in code is text.
    """
    before, _closer, rest = text.partition("</think>")
    has_start = before.lstrip().startswith("<think>")
    has_end = LONE_END.search(text) and "<think>" not in before and "```" not in before
    if not has_start and not has_end:
        return {"role": "assistant", "content": text}
    thought = before.lstrip().removeprefix("<think>").strip()
    message = {"role": "assistant", "content": rest.strip()}
    return {**message, "reasoning_content": thought} if thought else message


def parse_tools(text: str) -> list[dict]:
    """Read tool definitions from JSON: a list of functions, or an object with `tools`; ValueError for other text."""
    try:
        found = json.loads(text)
        return read_tools(found if isinstance(found, dict) and "tools" in found else {"tools": found})
    except RecursionError as error:
        raise ValueError(str(error)) from None


def tool_result(call: dict, text: str) -> dict:
    """Return the result of a call as a message."""
    result = {"role": "tool", "name": call["function"]["name"], "content": text}
    return result | ({"tool_call_id": call["id"]} if call.get("id") else {})


def encodable(text: str) -> str:
    """Replace lone surrogates, which can't be written, sent or tokenised, by question marks."""
    return text.encode("utf-8", "replace").decode()


# --- loading ------------------------------------------------------------------------------------------------------


def load_chat(
    model_path: str,
    *,
    chat_format: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    template_kwargs: dict | None = None,
    thinking: bool | None = None,
) -> Chat:
    """Load a checkpoint (full or LoRA adapter): bf16 on a GPU that has it, fp32 on a CPU.

    `template_kwargs` are further variables of its chat template (default: those it was trained with).
    `device_map="auto"` spreads the layers over all GPUs, and over the memory where they don't fit.
    """
    os.environ.setdefault(*PASSIVE_OPENMP_WAIT)
    import torch

    from sft.format.render import Renderer

    if problem := check_model_path(model_path, names=MODEL_FILES) or (device and _find_device_problem(device)):
        raise ValueError(problem)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _choose_dtype(place) if dtype in (None, "auto") else dtype
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if load_in_4bit:
        options |= four_bit(dtype) | ({"device_map": {"": device}} if device else {})
    if device_map:
        options["device_map"] = device_map
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if (Path(model_path) / ADAPTER).is_file():
        if base := base_of_adapter(model_path):
            check_base(model_path, base)
            check_weights(base, trust_remote_code=trust_remote_code)
        repair_peft()
        from peft import AutoPeftModelForCausalLM as Model
    else:
        options["output_loading_info"] = True
        from transformers import AutoModelForCausalLM as Model
    model = from_pretrained(Model, model_path, **options)
    model = model if "device_map" in options else model.to(place)
    renderer = Renderer(tokenizer, chat_format, template_kwargs=template_kwargs)
    if thinking is not None and not renderer.thinking_switch:
        raise ValueError(
            f"--thinking: the chat format of {model_path} ({renderer.name}) has no such switch, "
            "or --template_kwargs sets it"
        )
    return Chat(model.eval(), renderer, thinking=thinking)


def _choose_dtype(device: str) -> str:
    import torch

    if torch.device(device).type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _find_device_problem(device: str) -> str | None:
    import torch

    try:
        found = torch.device(device)
        torch.zeros(1, device="cpu" if found.type == "cuda" else found).tolist()  # mps on Linux, or meta
    except (RuntimeError, AssertionError):
        return f"--device {device}: no such device; use cpu, cuda or cuda:1"
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        return f"--device {device}: this machine shows {torch.cuda.device_count()} CUDA GPUs; use cpu, or leave it out"
    return None


def _to_object(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r}: give a JSON object, as {{"reasoning_effort": "low"}}')
    return found


def _to_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r}: use on or off")
    return text == "on"


MODEL_FLAGS = {
    "chat_format": {"default": "auto", "choices": FORMAT_NAMES},
    "device": {"help": "cuda, cuda:1, cpu ... (default: a GPU if there is one)"},
    "device_map": {"choices": ("auto",), "help": "auto: spread the model over all GPUs"},
    "dtype": {"default": "auto", "choices": DTYPES, "help": "auto: bf16 on a GPU that has it, fp32 on a CPU"},
    "load_in_4bit": {"action": "store_true", "help": "needs a CUDA GPU and bitsandbytes"},
    "trust_remote_code": {"action": "store_true", "help": "run code that comes with the model"},
    "template_kwargs": {"type": _to_object, "metavar": "JSON", "help": "further variables of its chat template"},
    "thinking": {"type": _to_switch, "metavar": "on|off", "help": "set the template's thinking switch"},
}


def add_model_flags(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add the flags of `load_chat` that a command has; all of them where none is named."""
    for name in names or MODEL_FLAGS:
        parser.add_argument(f"--{name}", **MODEL_FLAGS[name])


def model_options(options: argparse.Namespace) -> dict:
    """Return the arguments of `load_chat` that a command's flags give."""
    return {name: value for name, value in vars(options).items() if name in MODEL_FLAGS}


def find_newest_run(root: str | Path) -> str | None:
    """Return the model folder of the newest finished run under `root` (`*/model` with a run.json), or None."""
    finished = sorted(Path(root).glob("*/model/run.json"), key=lambda path: path.stat().st_mtime)
    return str(finished[-1].parent) if finished else None


def find_model(root: str | Path = "runs") -> str:
    """Return $MODEL_PATH, else the newest finished run; raises FileNotFoundError that says how to make one."""
    found = os.environ.get("MODEL_PATH") or find_newest_run(root)
    if not found:
        raise FileNotFoundError(f"no finished run in {root}/: make one with `sh base_run.sh`, or set MODEL_PATH")
    return found


def base_of(model_path: str) -> str:
    """Return the base that a checkpoint was trained from, by the run.json beside it or its adapter's config."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if base := json.loads((Path(model_path) / RUN_RECORD).read_text(encoding="utf-8"))["model"]:
            return base
    if base := base_of_adapter(model_path):
        return base
    raise ValueError(f"{model_path}: no run.json or adapter_config.json in it names the base; give its path")


def load_base(chat: Chat, model_path: str, base_path: str = "auto", **options) -> Chat:
    """Load the base of a checkpoint with the chat format of the checkpoint; ValueError if it isn't there.

    With "auto" also where it is no longer the base that the checkpoint was trained from.
    """
    base = base_of(model_path) if base_path == "auto" else base_path
    if base_path == "auto" and check_model_path(base) is None:
        check_base(model_path, base, remedy="name it with --base_path")
    loaded = load_chat(
        base, **{**options, "chat_format": chat.renderer.name, "template_kwargs": chat.renderer.template_kwargs}
    )
    loaded.renderer = loaded.renderer.on_day(chat.renderer.today)
    loaded.renderer.thinking = chat.renderer.thinking
    return loaded
