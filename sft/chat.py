"""Talk to a checkpoint: load it once, then `reply`, `stream_reply` or `reply_batch`.

    python -m sft.chat --model_path out/run --message "你好"
    python -m sft.chat --model_path out/run --message "你好" --message "再说一遍"     several turns
    python -m sft.chat --model_path out/run --input questions.jsonl --output answers.jsonl
    python -m sft.chat --model_path out/run                                            talk in the terminal

Prompts come from the same renderer as the training rows, so the model sees here what it saw there.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sft.batching import Decoder, Sampling
from sft.chat_format import FORMAT_NAMES, Renderer
from sft.conversation import RecordError, read_file, read_record
from sft.dataset import batches
from sft.model import PATIENT_THREADS, check_model_path, context_window, four_bit, from_pretrained, load_tokenizer


class Reply(NamedTuple):
    """What the model said; `ended` says whether it stopped by itself, `num_tokens` counts without the stop token."""

    text: str
    ended: bool
    num_tokens: int


BLOSSOM = Sampling()
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)


@dataclass
class Chat:
    """A loaded model with its renderer."""

    model: object
    renderer: Renderer

    def reply(self, messages: Sequence[dict], sampling: Sampling = BLOSSOM) -> Reply:
        """Reply to messages that end with the user's turn."""
        return self.reply_batch([messages], sampling)[0]

    def reply_batch(self, batch: Sequence[Sequence[dict]], sampling: Sampling = BLOSSOM) -> list[Reply]:
        """Reply to several conversations together."""
        decoder = self._decoder()
        requests = [decoder.add(self.prompt_ids(messages), sampling) for messages in batch]
        decoder.run()
        if failed := [request.error for request in requests if request.error]:
            raise failed[0]
        return [self.to_reply(request.ids) for request in requests]

    def stream_reply(
        self, messages: Sequence[dict], sampling: Sampling = BLOSSOM, stop: threading.Event | None = None
    ) -> Iterator[Reply]:
        """Yield the growing reply. Closing the generator, or setting `stop`, ends the model's work within a token.

        Streams that are read at the same time, in threads of their own, share one batch.
        """
        request = self.decoder.add(self.prompt_ids(messages), sampling, stop=stop)
        self.decoder.start()
        try:
            for count in self.decoder.follow(request):
                yield self.to_reply(request.ids[:count], growing=True)
            yield self.to_reply(request.ids)
        finally:
            request.cancel()
            self.decoder.wait(request)

    @cached_property
    def decoder(self) -> Decoder:
        """The batch that all streams of this chat share."""
        return self._decoder()

    def _decoder(self) -> Decoder:
        tokenizer = self.renderer.tokenizer
        window = self.context_window
        return Decoder(self.model, stop_ids=self.renderer.stop_ids, pad_id=tokenizer.pad_token_id or 0, window=window)

    def prompt_ids(self, messages: Sequence[dict]) -> list[int]:
        """Render the prompt; raises ValueError when it leaves no room for a reply in the model's context window."""
        prompt = self.renderer.prompt(messages)
        window = self.context_window
        if window and len(prompt) + 1 > window:
            raise ValueError(
                f"the conversation has {len(prompt):,} tokens, the model's context window {window:,}; shorten it"
            )
        return prompt

    @property
    def context_window(self) -> int | None:
        """The model's context length in tokens; None where it has no fixed one (ALiBi)."""
        return context_window(self.model.config)

    def to_reply(self, new_ids: Sequence[int], *, growing: bool = False) -> Reply:
        """Decode what was generated, up to the first stop token."""
        stops = [new_ids.index(stop) for stop in self.renderer.stop_ids if stop in new_ids]
        ids = new_ids[: min(stops, default=len(new_ids))]
        text = self.renderer.decode(ids)
        # A character of several tokens decodes to U+FFFD until its last token is there.
        return Reply(text.rstrip("\ufffd") if growing else text, bool(stops), len(ids))


def load_chat(
    model_path: str,
    *,
    chat_format: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> Chat:
    """Load a checkpoint (full or LoRA adapter) for talking: bf16 on a GPU that has it, fp32 on a CPU."""
    os.environ.setdefault(*PATIENT_THREADS)
    import torch

    if problem := check_model_path(model_path, names=("config.json", "adapter_config.json")):
        raise ValueError(problem)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = "float32" if device == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if load_in_4bit:
        options |= four_bit(dtype)
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if (Path(model_path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as Model
    else:
        from transformers import AutoModelForCausalLM as Model
    model = from_pretrained(Model, model_path, **options)
    model = model if load_in_4bit else model.to(device)
    return Chat(model.eval(), Renderer(tokenizer, chat_format))


def newest_run(root: str | Path) -> str | None:
    """Return the model folder of the newest finished run under `root` (`*/model` with a run.json), or None."""
    finished = sorted(Path(root).glob("*/model/run.json"), key=lambda path: path.stat().st_mtime)
    return str(finished[-1].parent) if finished else None


def reply_to_file(chat: Chat, source: str, output: str, *, sampling: Sampling, batch_size: int = 8) -> int:
    """Answer every conversation of a JSON file (any raw form; a trailing reply in it is ignored); return how many.

    Writes JSON Lines of {"messages": [..., reply], "ended", "num_tokens"} beside `output`, then moves it into place.
    """
    partial = Path(f"{output}.{os.getpid()}.partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            for batch in batches(_prompts(source), batch_size):
                for messages, reply in zip(batch, chat.reply_batch(batch, sampling), strict=True):
                    answer = [*messages, {"role": "assistant", "content": reply.text}]
                    line = {"messages": answer, "ended": reply.ended, "num_tokens": reply.num_tokens}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
                print(f"\r{count} replies", end="", file=sys.stderr, flush=True)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    print(file=sys.stderr)
    return count


def _prompts(source: str) -> Iterator[list[dict]]:
    for raw in read_file(source):
        try:
            if raw.error:
                raise raw.error
            yield to_prompt(raw.record, source=source, line=raw.line)
        except RecordError as error:
            raise ValueError(f"{source} line {raw.line}: {error}") from None


ASKING, ANSWERING = (
    ("prompt", "instruction", "query", "question"),
    ("input", "output", "completion", "response", "answer"),
)


def to_prompt(record: object, *, source: str = "record", line: int = 1) -> list[dict]:
    """Read a question: a record of any raw form, without its last reply, or an object with a lone prompt."""
    if isinstance(record, dict) and not any(record.get(key) for key in ANSWERING):
        lone = [record[key] for key in ASKING if isinstance(record.get(key), str)]
        if len(lone) == 1:
            return [{"role": "user", "content": lone[0]}]
    messages = read_record(record, source=source, line=line)["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise RecordError("no_question", "no user message to answer")
    return messages


def _say(chat: Chat, messages: list[dict], sampling: Sampling) -> Reply:
    shown = ""
    for reply in chat.stream_reply(messages, sampling):
        print(reply.text[len(shown) :], end="", flush=True)
        shown = reply.text
    print("" if reply.ended else "\n[stopped at --max_new_tokens]", flush=True)
    return reply


def converse(chat: Chat, questions: Iterable[str], *, system: str | None, sampling: Sampling) -> list[dict]:
    """Ask the questions one after the other in one conversation, printing each reply as it comes."""
    messages = [{"role": "system", "content": system}] if system and system.strip() else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        print(f"> {question}", flush=True)
        messages.append({"role": "assistant", "content": _say(chat, messages, sampling).text})
    return messages


def _typed() -> Iterator[str]:
    """Lines typed in a terminal until end of file (Ctrl-D) or Ctrl-C."""
    while True:
        try:
            line = input("? ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.chat", description="Talk to a checkpoint.")
    parser.add_argument(
        "--model_path", required=True, help="a folder that train.py wrote, any model folder, or a hub model"
    )
    parser.add_argument("--message", action="append", help="a question; repeat it for several turns")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--input", help="a JSON file of questions or conversations, answered in batches")
    parser.add_argument("--output", help="where the answers to --input go (JSON Lines)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--chat_format", default="auto", choices=FORMAT_NAMES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--trust_remote_code", action="store_true")
    for name, value in asdict(Sampling()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser


def _check(options: argparse.Namespace) -> None:
    if bool(options.input) != bool(options.output):
        raise ValueError("--input and --output go together")
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise ValueError("--batch_size and --max_new_tokens must be at least 1")
    if options.input and not Path(options.input).is_file():
        raise ValueError(f"--input {options.input}: no such file")
    if options.output and Path(options.output).exists() and not options.overwrite:
        raise ValueError(f"--output {options.output}: exists; add --overwrite to replace it")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    sampling = Sampling(**{name: getattr(options, name) for name in asdict(Sampling())})
    try:
        _check(options)
        chat = load_chat(
            options.model_path,
            chat_format=options.chat_format,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        from transformers import set_seed

        set_seed(options.seed)
        if options.input:
            count = reply_to_file(chat, options.input, options.output, sampling=sampling, batch_size=options.batch_size)
            print(f"wrote {count} replies to {options.output}")
        else:
            converse(chat, options.message or _typed(), system=options.system, sampling=sampling)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.chat: {error}")


if __name__ == "__main__":
    main()
