"""The terminal: a dialogue with one model or several, and the command `python -m sft.chat`.

python -m sft.chat                                                                 talk to the newest run
python -m sft.chat --model_path out/run --message "你好" --message "再说一遍"     several turns
python -m sft.chat --model_path out/run --base_path auto                           base and tuned together
python -m sft.chat --model_path out/run --message "你好" --show_probabilities     tokens in colour
python -m sft.chat --model_path out/run --input questions.jsonl --output answers.jsonl
"""

import argparse
import os
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

from sft.chat.answer_file import check_output, check_questions, reply_to_file
from sft.chat.reply import Chat, Reply, add_model_flags, find_model, load_base, load_chat, model_options
from sft.chat.sampling import BLOSSOM, Sampling
from sft.chat.token_probabilities import printable, to_terminal


class Dialogue:
    """A conversation in the terminal with one model or several, each with its own history."""

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
        """Drop the history; the system message stays."""
        self.turns: dict[str, list[dict]] = {name: [] for name in self.chats}

    def messages(self, name: str) -> list[dict]:
        system = (self.system or "").strip()
        return [*([{"role": "system", "content": system}] if system else []), *self.turns[name]]

    def ask(self, question: str) -> None:
        """Print each model's reply as it comes; a question without a reply is dropped from the history.

        If `interruptible`, Ctrl-C ends a reply and keeps its text; else it ends the program.
        """
        for name, chat in self.chats.items():
            if len(self.chats) > 1:
                print(f"[{name}]", flush=True)
            turn = {"role": "user", "content": question}
            text = self._print_reply(chat, [*self.messages(name), turn])
            if text is not None:
                self.turns[name] += [turn, {"role": "assistant", "content": text}]

    def _print_reply(self, chat: Chat, messages: list[dict]) -> str | None:
        text, end = None, ""
        try:
            if self.show_probabilities:
                reply, pieces = chat.reply_with_pieces(messages, self.sampling)
                colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
                print(to_terminal(pieces, colour=colour), end="")
                text = reply.text
            else:
                for reply in _print_stream(chat, messages, self.sampling):
                    text = reply.text
            end = "" if reply.ended else "\n[stopped at --max_new_tokens]"
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            end = "\n[stopped]"
        print(end, flush=True)
        return text


def _print_stream(chat: Chat, messages: list[dict], sampling: Sampling) -> Iterator[Reply]:
    """Print each new part of a reply and yield the reply."""
    shown = 0
    with closing(chat.stream_reply(messages, sampling)) as stream:
        for reply in stream:
            print(printable(reply.text[shown:]), end="", flush=True)
            shown = len(reply.text)
            yield reply


def converse(
    chat: Chat, questions: Iterable[str], *, system: str | None = None, sampling: Sampling = BLOSSOM
) -> list[dict]:
    """Ask the questions in turn in one conversation and print each reply as it comes; return the messages."""
    dialogue = Dialogue({"": chat}, system=system, sampling=sampling)
    for question in questions:
        print(f"> {question}", flush=True)
        dialogue.ask(question)
    return dialogue.messages("")


HELP = "/clear begins anew, /system TEXT sets the system message, Ctrl-C stops a reply, /quit or Ctrl-D ends"


def talk(dialogue: Dialogue) -> None:
    """Answer each question until /quit or the end of the input; an error is printed and the dialogue continues."""
    for typed in _read_questions():
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


def _read_questions() -> Iterator[str]:
    """Yield typed questions until end of file (Ctrl-D); lines that are pasted together are one question."""
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
    """Replace bytes that are no text in the terminal's encoding by question marks."""
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
    add("--output", help="where the answers to --input go (JSON Lines); rerun the command to resume")
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
    """Raise ValueError for every mistake that is visible before the model is loaded."""
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
    model_path = options.model_path or find_model()
    chat = load_chat(model_path, **model_options(options))
    if options.input:
        how = {name: getattr(options, name) for name in ("batch_size", "seed", "system", "overwrite")}
        count = reply_to_file(chat, options.input, options.output, sampling=sampling, **how)
        print(f"wrote {count} replies to {options.output}")
        return
    from transformers import set_seed

    chats = {"tuned": chat}
    if options.base_path:
        chats = {"base": load_base(chat, model_path, options.base_path, **model_options(options)), **chats}
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


def _resume_note(options: argparse.Namespace) -> str:
    if not options.output or not Path(f"{options.output}.partial").exists():
        return ""
    return f"; the answers so far are in {options.output}.partial; rerun the same command to resume"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"sft.chat: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nsft.chat: stopped{_resume_note(options)}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"sft.chat: out of memory; lower --batch_size or --max_new_tokens{_resume_note(options)}")
