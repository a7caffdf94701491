"""Talk to a checkpoint: load it once, then `reply`, `stream_reply` or `reply_batch`.

    python -m sft.chat                                                                 talk to the newest run
    python -m sft.chat --model_path out/run --message "你好" --message "再说一遍"     several turns
    python -m sft.chat --model_path out/run --base_path auto                           base and tuned together
    python -m sft.chat --model_path out/run --message "你好" --show_probabilities     tokens in colour
    python -m sft.chat --model_path out/run --input questions.jsonl --output answers.jsonl

Prompts come from the same renderer as the training rows, so the model sees here what it saw there.
"""

import argparse
import hashlib
import itertools
import json
import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sft.chat.answer_file import Partial, answer_missing, check_output, check_questions, read_questions
from sft.chat.batching import Decoder, Sampling
from sft.chat.token_probabilities import Piece, printable, score, to_terminal
from sft.format.render import FORMAT_NAMES, Renderer
from sft.model.load import (
    DTYPES,
    PATIENT_THREADS,
    check_model_path,
    context_window,
    four_bit,
    from_pretrained,
    load_tokenizer,
)


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

    def reply_each(
        self,
        questions: Iterable[tuple[object, Sequence[dict]]],
        sampling: Sampling = BLOSSOM,
        *,
        at_once: int = 8,
        seed: int = 0,
    ) -> Iterator[tuple[object, Reply]]:
        """Yield (key, reply) for each (key, messages), in the order they end, with `at_once` in the making.

        Each reply is drawn with a seed made of `seed` and its key: it is the same whatever else is asked.
        """
        decoder, left, running = self._decoder(), iter(questions), {}
        decoder.max_active = at_once
        while True:
            for key, messages in itertools.islice(left, 2 * at_once - len(running)):
                own_seed = int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:15], 16)
                running[key] = decoder.add(self.prompt_ids(messages), sampling, seed=own_seed)
            if not running:
                return
            decoder.step()
            for key in [key for key, request in running.items() if request.done]:
                request = running.pop(key)
                if request.error:
                    raise request.error
                yield key, self.to_reply(request.ids)

    def reply_with_pieces(self, messages: Sequence[dict], sampling: Sampling = BLOSSOM) -> tuple[Reply, list[Piece]]:
        """Reply, and say how sure the model was of each token; see `sft.chat.token_probabilities`."""
        decoder, prompt = self._decoder(), self.prompt_ids(messages)
        request = decoder.add(prompt, sampling)
        decoder.run()
        if request.error:
            raise request.error
        return self.to_reply(request.ids), score(self.model, self.renderer.tokenizer, prompt, request.ids)

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
    device_map: str | None = None,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> Chat:
    """Load a checkpoint (full or LoRA adapter) for talking: bf16 on a GPU that has it, fp32 on a CPU.

    `device_map="auto"` spreads the layers over all GPUs, and over the memory where they don't fit.
    """
    os.environ.setdefault(*PATIENT_THREADS)
    import torch

    if problem := check_model_path(model_path, names=("config.json", "adapter_config.json")):
        raise ValueError(problem)
    if problem := device and _device_problem(device):
        raise ValueError(problem)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype in (None, "auto"):
        dtype = (
            "float32"
            if torch.device(place).type == "cpu"
            else "bfloat16"
            if torch.cuda.is_bf16_supported()
            else "float16"
        )
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if load_in_4bit:
        options |= four_bit(dtype) | ({"device_map": {"": device}} if device else {})
    if device_map:
        options["device_map"] = device_map
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if (Path(model_path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as Model
    else:
        from transformers import AutoModelForCausalLM as Model
    model = from_pretrained(Model, model_path, **options)
    model = model if "device_map" in options else model.to(place)
    return Chat(model.eval(), Renderer(tokenizer, chat_format))


def _device_problem(device: str) -> str | None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        return f"--device {device}: no such device; use cpu, cuda or cuda:1"
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        return f"--device {device}: this machine shows {torch.cuda.device_count()} CUDA GPUs; use cpu, or leave it out"
    return None


def newest_run(root: str | Path) -> str | None:
    """Return the model folder of the newest finished run under `root` (`*/model` with a run.json), or None."""
    finished = sorted(Path(root).glob("*/model/run.json"), key=lambda path: path.stat().st_mtime)
    return str(finished[-1].parent) if finished else None


def find_model(root: str | Path = "runs") -> str:
    """Return $MODEL_PATH, else the newest finished run; raises FileNotFoundError that says how to make one."""
    found = os.environ.get("MODEL_PATH") or newest_run(root)
    if not found:
        raise FileNotFoundError(f"no finished run in {root}/: make one with `sh base_run.sh`, or set MODEL_PATH")
    return found


def base_of(model_path: str) -> str:
    """Return the base that a checkpoint was trained from, as run.json beside it or its adapter names it."""
    for name, key in (("run.json", "model"), ("adapter_config.json", "base_model_name_or_path")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if base := json.loads((Path(model_path) / name).read_text(encoding="utf-8"))[key]:
                return base
    raise ValueError(f"{model_path}: no run.json or adapter_config.json in it names the base; give its path")


def load_base(chat: Chat, model_path: str, base_path: str = "auto", **options) -> Chat:
    """Load the base of a checkpoint with the chat format that it was tuned for; ValueError if it isn't there."""
    base = base_of(model_path) if base_path == "auto" else base_path
    return load_chat(base, chat_format=chat.renderer.name, **options)


def identity(model) -> str:
    """A hash of some numbers of every weight: another checkpoint, dtype or adapter has another one."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 256)]
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def reply_to_file(
    chat: Chat,
    source: str,
    output: str,
    *,
    sampling: Sampling = BLOSSOM,
    batch_size: int = 8,
    seed: int = 42,
    system: str | None = None,
    overwrite: bool = False,
) -> int:
    """Answer every conversation of a JSON file (any raw form; a trailing reply in it is ignored); return how many.

    Writes JSON Lines of {"messages": [..., reply], "ended", "num_tokens"} in the order of the questions. The answers so
    far stay in OUTPUT.partial, from which the same call goes on; see `sft.chat.answer_file`.
    """
    from tqdm import tqdm

    check_output(output, overwrite=overwrite)
    if Path(output).exists() and Path(output).samefile(source):
        raise ValueError(f"--output {output}: is the file of questions")
    count, questions = check_questions(source, system, chat.prompt_ids)
    belongs_to = {"questions": questions, "model": identity(chat.model), "sampling": asdict(sampling), "seed": seed}
    belongs_to["chat format"] = chat.renderer.fingerprint()[:16]
    with closing(Partial(f"{output}.partial", belongs_to)) as partial:
        check_output(output, overwrite=overwrite)  # another process may have just written it
        missing = answer_missing(
            partial,
            read_questions(source, system),
            lambda asked: chat.reply_each(asked, sampling, at_once=batch_size, seed=seed),
        )
        with tqdm(total=count, initial=len(partial.places), unit="reply", dynamic_ncols=True) as bar:
            for _ in missing:
                bar.update()
        partial.finish(output, overwrite=overwrite)
    return count


class Dialogue:
    """A conversation in the terminal, with one model, or with several that each see their own replies."""

    def __init__(
        self,
        chats: dict[str, Chat],
        *,
        system: str | None = None,
        sampling: Sampling = BLOSSOM,
        show_probabilities: bool = False,
        interruptible: bool = False,
    ):
        self.chats, self.system, self.sampling = chats, system, sampling
        self.show_probabilities, self.interruptible = show_probabilities, interruptible
        self.clear()

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns: dict[str, list[dict]] = {name: [] for name in self.chats}

    def messages(self, name: str) -> list[dict]:
        system = (self.system or "").strip()
        return [*([{"role": "system", "content": system}] if system else []), *self.turns[name]]

    def ask(self, question: str) -> None:
        """Print each model's reply as it comes. What fails, or is stopped before it says anything, is as if not asked.

        If `interruptible`, Ctrl-C ends a reply, and what was said stays; else it ends the program.
        """
        for name, chat in self.chats.items():
            if len(self.chats) > 1:
                print(f"[{name}]", flush=True)
            turn = {"role": "user", "content": question}
            said = self._say(chat, [*self.messages(name), turn])
            if said is not None:
                self.turns[name] += [turn, {"role": "assistant", "content": said}]

    def _say(self, chat: Chat, messages: list[dict]) -> str | None:
        said, end = None, ""
        try:
            if self.show_probabilities:
                reply, pieces = chat.reply_with_pieces(messages, self.sampling)
                colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
                print(to_terminal(pieces, colour=colour), end="")
                said = reply.text
            else:
                for reply in _shown(chat, messages, self.sampling):
                    said = reply.text
            end = "" if reply.ended else "\n[stopped at --max_new_tokens]"
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            end = "\n[stopped]"
        print(end, flush=True)
        return said


def _shown(chat: Chat, messages: list[dict], sampling: Sampling) -> Iterator[Reply]:
    """Pass a stream on, each new part printed."""
    shown = 0
    with closing(chat.stream_reply(messages, sampling)) as stream:
        for reply in stream:
            print(printable(reply.text[shown:]), end="", flush=True)
            shown = len(reply.text)
            yield reply


def converse(
    chat: Chat, questions: Iterable[str], *, system: str | None = None, sampling: Sampling = BLOSSOM
) -> list[dict]:
    """Ask the questions one after the other in one conversation, printing each reply as it comes."""
    dialogue = Dialogue({"": chat}, system=system, sampling=sampling)
    for question in questions:
        print(f"> {question}", flush=True)
        dialogue.ask(question)
    return dialogue.messages("")


HELP = "/clear begins anew, /system TEXT sets the system message, Ctrl-C stops a reply, /quit or Ctrl-D ends"


def talk(dialogue: Dialogue) -> None:
    """Answer what is typed until /quit or the end of the input; a mistake is told and the talk goes on."""
    for typed in _typed():
        command, _, text = typed.partition(" ")
        if command == "/quit":
            return
        if typed == "/help":
            print(HELP)
        elif typed == "/clear":
            dialogue.clear()
        elif command == "/system":
            dialogue.system = text
        else:
            try:
                dialogue.ask(typed)
            except ValueError as error:
                print(f"[{error}; /clear begins anew]")


def _typed() -> Iterator[str]:
    """What is typed, until end of file (Ctrl-D). Lines that are pasted together come together."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and has a history
    while True:
        lines = []
        try:
            lines.append(input("? "))
            while sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
                lines.append(input())
        except KeyboardInterrupt:
            print(f"\n[{HELP}]")
            continue
        except EOFError:
            if not lines:
                print()
                return
        if text := _encodable("\n".join(lines)).strip():
            yield text


def _encodable(text: str) -> str:
    """Bytes that were no text in the terminal's encoding become question marks."""
    return text.encode("utf-8", "replace").decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.chat", description="Talk to a checkpoint.")
    add = parser.add_argument
    add("--model_path", help="a folder that train.py wrote, any model folder, or a hub model (default: the newest run)")
    add("--message", action="append", help="a question; repeat it for several turns")
    add("--system", help="the system message")
    add("--base_path", help="a second model that answers too, in the same format; auto: the base that was tuned")
    add("--show_probabilities", action="store_true", help="colour each token by how sure the model was of it")
    add("--input", help="a JSON file of questions or conversations, answered in batches")
    add("--output", help="where the answers to --input go (JSON Lines); run it again to go on after a stop")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--chat_format", default="auto", choices=FORMAT_NAMES)
    add("--batch_size", type=int, default=8, help="questions of --input that are answered together")
    add("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    add("--device_map", choices=("auto",), help="auto: spread the model over all GPUs")
    add("--dtype", default="auto", choices=DTYPES, help="auto: bf16 on a GPU that has it, fp32 on a CPU")
    add("--load_in_4bit", action="store_true", help="needs a CUDA GPU and bitsandbytes")
    add("--seed", type=int, default=42)
    add("--trust_remote_code", action="store_true")
    for name, value in asdict(Sampling()).items():
        add(f"--{name}", type=type(value), default=value)
    return parser


def _problems(options: argparse.Namespace) -> Iterator[str]:
    if bool(options.input) != bool(options.output):
        yield "--input and --output go together"
    alone = [f"--{name}" for name in ("message", "base_path", "show_probabilities") if getattr(options, name)]
    if options.input and alone:
        yield f"--input goes without {', '.join(alone)}"
    if options.input and not Path(options.input).is_file():
        yield f"--input {options.input}: no such file"
    if options.device and options.device_map:
        yield "--device and --device_map: give one of them"
    if not all(message.strip() for message in options.message or ()):
        yield "--message: is empty"
    if options.batch_size < 1 or options.max_new_tokens < 1:
        yield "--batch_size and --max_new_tokens must be at least 1"
    if not 0 <= options.temperature < float("inf"):
        yield f"--temperature {options.temperature}: must be 0 (greedy) or more"
    if not 0 < options.top_p <= 1:
        yield f"--top_p {options.top_p}: must be above 0 and at most 1"
    if options.top_k < 0:
        yield f"--top_k {options.top_k}: must be 0 (all tokens) or more"
    if not 0 < options.repetition_penalty < float("inf"):
        yield f"--repetition_penalty {options.repetition_penalty}: must be above 0"


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for whatever can be known before the model is loaded."""
    if problems := list(_problems(options)):
        raise ValueError("; ".join(problems))
    if options.output:
        check_output(options.output, overwrite=options.overwrite)
    if options.input:
        check_questions(options.input, options.system, lambda messages: None)


def _run(options: argparse.Namespace) -> None:
    options.system = _encodable(options.system or "").strip()
    _check(options)
    sampling = Sampling(**{name: getattr(options, name) for name in asdict(Sampling())})
    loading = {name: getattr(options, name) for name in ("device", "device_map", "dtype", "load_in_4bit")}
    loading["trust_remote_code"] = options.trust_remote_code
    model_path = options.model_path or find_model()
    chat = load_chat(model_path, chat_format=options.chat_format, **loading)
    if options.input:
        how = {name: getattr(options, name) for name in ("batch_size", "seed", "system", "overwrite")}
        count = reply_to_file(chat, options.input, options.output, sampling=sampling, **how)
        print(f"wrote {count} replies to {options.output}")
        return
    from transformers import set_seed

    chats = {"tuned": chat}
    if options.base_path:
        chats = {"base": load_base(chat, model_path, options.base_path, **loading), **chats}
    set_seed(options.seed)
    dialogue = Dialogue(
        chats,
        system=options.system,
        sampling=sampling,
        show_probabilities=options.show_probabilities,
        interruptible=not options.message,
    )
    for question in map(_encodable, options.message or ()):
        print(f"> {question}", flush=True)
        dialogue.ask(question)
    if not options.message:
        print(f"{model_path}, {chat.renderer.name}\n{HELP}")
        talk(dialogue)


def _kept(options: argparse.Namespace) -> str:
    there = options.output and Path(f"{options.output}.partial").exists()
    return (
        f"; the answers so far are in {options.output}.partial, and the same command goes on with them" if there else ""
    )


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.chat: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nsft.chat: stopped{_kept(options)}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"sft.chat: out of memory; lower --batch_size or --max_new_tokens{_kept(options)}")
