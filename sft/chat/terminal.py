"""The terminal: a dialogue with one model or several, and the command `python -m sft.chat`.

python -m sft.chat                                                                 talk to the newest run
python -m sft.chat --model_path out/run --message "你好" --message "再说一遍"     several turns
python -m sft.chat --model_path out/run --base_path auto                           base and tuned together
python -m sft.chat --model_path out/run --message "你好" --show_probabilities     tokens in colour
python -m sft.chat --model_path out/run --input questions.jsonl --output answers.jsonl
"""

import argparse
import gc
import json
import re
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

from sft.chat.answer_file import check_output, check_questions, reply_to_file
from sft.chat.reply import (
    Chat,
    Reply,
    add_model_flags,
    encodable,
    find_model,
    load_base,
    load_chat,
    model_options,
    parse_tools,
    tool_result,
)
from sft.chat.sampling import BLOSSOM, PENALTIES, Sampling
from sft.chat.token_probabilities import to_printable, to_terminal
from sft.format.contract import check_variables
from sft.tables import has_colour


@dataclass
class Dialogue:
    """A conversation in the terminal with one model or several, each with its own history."""

    chats: dict[str, Chat]
    _: KW_ONLY
    system: str | None = None
    sampling: Sampling = BLOSSOM
    show_probabilities: bool = False
    interruptible: bool = False

    def __post_init__(self):
        self.clear()

    def clear(self) -> None:
        """Drop the history; the system message stays."""
        self.turns: dict[str, list[dict]] = {name: [] for name in self.chats}

    def messages(self, name: str) -> list[dict]:
        system = (self.system or "").strip()
        return [*([{"role": "system", "content": system}] if system else []), *self.turns[name]]

    def open_calls(self, name: str) -> list[dict]:
        """Return the calls of a model's last reply whose results are missing."""
        for num_results, message in enumerate(reversed(self.turns[name])):
            if message["role"] != "tool":
                return (message.get("tool_calls") or [])[num_results:]
        return []

    def next_call(self) -> str | None:
        """Return the name of the function whose result comes next; None when a question does."""
        open_calls = [call for name in self.chats for call in self.open_calls(name)]
        return open_calls[0]["function"]["name"] if open_calls else None

    def last_thought(self) -> str:
        thoughts = [
            turn["reasoning_content"]
            for turns in self.turns.values()
            for turn in turns
            if turn.get("reasoning_content")
        ]
        return thoughts[-1] if thoughts else "[no thought]"

    def ask(self, text: str) -> None:
        """Print each model's reply to a question, or to the result of its call, as it comes.

        A question without a reply is dropped from the history. If `interruptible`, Ctrl-C ends a reply and keeps its
        text; else it ends the program.
        """
        is_result = self.next_call() is not None
        for name, chat in self.chats.items():
            calls = self.open_calls(name)
            if is_result and not calls:  # another model's call
                continue
            turn = tool_result(calls[0], text) if is_result else {"role": "user", "content": text}
            if len(calls) > 1:
                self.turns[name].append(turn)
                continue
            if len(self.chats) > 1:
                print(f"[{name}]", flush=True)
            message = self._print_reply(chat, chat.history([*self.messages(name), turn]))
            if message is not None:
                self.turns[name] += [turn, message]

    def _print_reply(self, chat: Chat, messages: list[dict]) -> dict | None:
        reply = None
        end = ""
        try:
            if self.show_probabilities:
                reply, pieces = chat.reply_with_pieces(messages, self.sampling)
                print(to_terminal(pieces, colour=has_colour()), end="")
            else:
                for reply in _print_stream(chat, messages, self.sampling):  # noqa: B007  the last one is kept
                    pass
            end = "" if reply.ended else "\n[stopped at --max_new_tokens]"
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            end = "\n[stopped]"
        print(end, flush=True)
        return reply and _message(reply)


def _message(reply: Reply) -> dict:
    return reply.message or {"role": "assistant", "content": reply.text}


def _print_stream(chat: Chat, messages: list[dict], sampling: Sampling) -> Iterator[Reply]:
    """Print each new part of a reply and yield the reply; thoughts are folded, calls printed when they are complete."""
    printed = ""
    folded = False
    message = {}
    with closing(chat.stream_reply(messages, sampling)) as stream:
        for reply in stream:
            message = _message(reply)
            if message.get("reasoning_content") and not folded:
                folded = True
                print("[thinking; /thought shows it]", flush=True)
            call = CALL_START.search(message["content"]) if chat.tools else None
            text = message["content"][: call.start() if call else None]
            if text.startswith(printed):
                print(to_printable(text[len(printed) :]), end="", flush=True)
                printed = text
            yield reply
    if message.get("content", "").startswith(printed):
        print(to_printable(message["content"][len(printed) :]), end="")
    for call in message.get("tool_calls") or ():
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        print(to_printable(f"\n[call] {call['function']['name']} {arguments}"), end="")


def converse(
    chat: Chat, questions: Iterable[str], *, system: str | None = None, sampling: Sampling = BLOSSOM
) -> list[dict]:
    """Ask the questions in turn in one conversation and print each reply as it comes; return the messages."""
    dialogue = Dialogue({"": chat}, system=system, sampling=sampling)
    for question in questions:
        print(f"> {question}", flush=True)
        dialogue.ask(question)
    return dialogue.messages("")


HELP = (
    "/clear begins anew, /system TEXT sets the system message, /thought shows the last thought, "
    "Ctrl-C stops a reply, /quit or Ctrl-D ends"
)
# The start of a call, as models write it; its text is complete only with its end.
CALL_START = re.compile(
    r"<\|?tool|<function|<｜tool|\[TOOL_CALLS\]|<\|python_tag\|>|^\s*[\[{]|<[^\s>]{0,20}$|\[[A-Z_]*$"
)


def talk(dialogue: Dialogue) -> None:
    """Answer each question until /quit or the end of the input; an error is printed and the dialogue continues."""
    for typed in _read_questions(dialogue):
        command, _, text = typed.partition(" ")
        if command == "/quit":
            return
        if typed == "/help":
            print(HELP)
        elif typed == "/clear":
            dialogue.clear()
        elif typed == "/thought":
            print(to_printable(dialogue.last_thought()))
        elif command == "/system":
            dialogue.system = text
        else:
            try:
                dialogue.ask(typed)
            except ValueError as error:
                print(f"[{error}; /clear begins anew]")


def _read_questions(dialogue: Dialogue) -> Iterator[str]:
    """Yield typed questions and results of calls until end of file (Ctrl-D); lines pasted together are one."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and has a history
    while True:
        lines = []
        try:
            call = dialogue.next_call()
            lines.append(input(f"result of {to_printable(call)}? " if call else "? "))
            while sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
                lines.append(input())
        except KeyboardInterrupt:
            print(f"\n[{HELP}]")
            continue
        except EOFError:
            if not lines:
                print()
                return
        if text := encodable("\n".join(lines)).strip():
            yield text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sft.chat", description="Talk to a checkpoint.")
    add = parser.add_argument
    add("--model_path", help="a folder that train.py wrote, any model folder, or a hub model (default: the newest run)")
    add("--message", action="append", help="a question; repeat it for several turns")
    add("--system", help="the system message")
    add("--base_path", help="a second model that answers too, in the same format; auto: the base that was tuned")
    add("--tools", help="a JSON file of tool definitions; a call is shown, and its result is typed")
    add("--show_probabilities", action="store_true", help="colour each token by how sure the model was of it")
    add("--input", help="a JSON file of questions or conversations, answered in batches")
    add("--output", help="file for the answers to --input (JSON Lines); rerun the command to resume")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--batch_size", type=int, default=8, help="questions of --input that are answered together")
    add("--seed", type=int, default=42)
    add_model_flags(parser)
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
    if options.tools and not Path(options.tools).is_file():
        yield f"--tools {options.tools}: no such file"
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
    if not PENALTIES[0] <= options.repetition_penalty <= PENALTIES[1]:
        yield f"--repetition_penalty {options.repetition_penalty}: must be from {PENALTIES[0]} to {PENALTIES[1]:g}"


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for every mistake that is visible before the model is loaded."""
    if problems := list(_problems(options)):
        raise ValueError("; ".join(problems))
    if options.output:
        check_output(options.output, overwrite=options.overwrite)
    if options.input:
        check_questions(options.input, options.system, lambda messages: None)


def load_tools(path: str) -> list[dict]:
    """Read tool definitions from a JSON file."""
    try:
        tools = parse_tools(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--tools {path}: {error}") from None
    if not tools:
        raise ValueError(f"--tools {path}: holds no tool")
    return tools


def _run_command(options: argparse.Namespace) -> None:
    options.system = encodable(options.system or "").strip()
    _check_options(options)
    sampling = Sampling(**{name: getattr(options, name) for name in asdict(Sampling())})
    model_path = options.model_path or find_model()
    tools = load_tools(options.tools) if options.tools else None
    chat = load_chat(model_path, **model_options(options))
    gc.enable()  # off during the imports, see __main__.py
    check_variables(chat.renderer, options.template_kwargs)
    if tools and not chat.renderer.can_use_tools:
        raise ValueError(f"--tools: chat format {chat.renderer.name!r} has no place for tools; use chatml or base")
    chat.tools = tools
    if options.input:
        how = {name: getattr(options, name) for name in ("batch_size", "seed", "system", "overwrite")}
        count = reply_to_file(chat, options.input, options.output, sampling=sampling, **how)
        print(f"wrote {count} replies to {options.output}")
        return
    import torch

    chats = {"tuned": chat}
    if options.base_path:
        base = load_base(chat, model_path, options.base_path, **model_options(options))
        base.tools = tools
        chats = {"base": base, **chats}
    torch.manual_seed(options.seed)
    dialogue = Dialogue(
        chats,
        system=options.system,
        sampling=sampling,
        show_probabilities=options.show_probabilities,
        interruptible=not options.message,
    )
    for question in map(encodable, options.message or ()):
        print(f"> {question}", flush=True)
        dialogue.ask(question)
    if not options.message:
        print(f"{model_path}, {chat.renderer.name}\n{HELP}")
        talk(dialogue)


def _resume_note(options: argparse.Namespace) -> str:
    if not options.output or not Path(f"{options.output}.partial").exists():
        return ""
    return f"; the answers so far are in {options.output}.partial; rerun the same command to resume"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        _run_command(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.chat: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nsft.chat: stopped{_resume_note(options)}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"sft.chat: out of memory; lower --batch_size or --max_new_tokens{_resume_note(options)}")
