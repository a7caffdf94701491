"""Answer a file of questions: check them all first, then append each answer to a file as it comes.

    OUTPUT.partial    {"answers_of": {"questions": "5d…", "model": "a0…", "sampling": …}}     the run they belong to
                      {"position": 1, "messages": […], "ended": true, …}                      in the order they come
                      {"position": 0, "messages": […], …
    OUTPUT            the same lines in the order of the questions, once all are there

Rerun the same command to resume: only a last line that was cut off is answered again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

from sft.chat.reply import Asked, Chat
from sft.chat.sampling import BLOSSOM, Sampling
from sft.files import LineLog, open_whole
from sft.opendata.conversation import check_messages, read_record
from sft.opendata.fields import CHOSEN_KEYS, REJECTED_KEYS, FieldCounts, RecordError, find_form, list_counts, name_type
from sft.opendata.records import split_file

# The keys of a lone question, with that of the answer which makes it a record of a form of the training data.
QUESTION_KEYS = {"prompt": "completion", "instruction": "output", "query": "response", "question": "answer"}
ANSWER_KEYS = ("input", "output", "completion", "response", "answer")


def read_questions(
    source: str, system: str | None = None, counts: FieldCounts | None = None
) -> Iterator[tuple[int | str, Asked]]:
    """Yield each record's line and its messages, `system` in front where they have none.

    A record with tools or `chat_template_kwargs` of its own is yielded as an object that has them beside its messages.
    Fields that are not read are counted in `counts`. Raises ValueError with file and line for the first record that
    holds no question.
    """
    for raw in split_file(source, parse=True):
        try:
            asked = to_prompt(raw.parse(), source=source, line=raw.line, counts=counts)
        except RecordError as error:
            raise ValueError(f"{source} line {raw.line}: {error}") from None
        messages = messages_of(asked)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        yield raw.line, {**asked, "messages": messages} if isinstance(asked, dict) else messages


def messages_of(asked: Asked) -> list[dict]:
    return asked["messages"] if isinstance(asked, dict) else asked


def to_prompt(
    record: object, *, source: str = "record", line: int | str = 1, counts: FieldCounts | None = None
) -> Asked:
    """Read a question: a record of any raw form, without its last reply, or an object with a lone prompt."""
    variables = record.get("chat_template_kwargs") if isinstance(record, dict) else None
    if variables is not None and not isinstance(variables, dict):
        raise RecordError("chat_template_kwargs", f"is {name_type(variables)}; write an object of template variables")
    if isinstance(record, dict):
        left_out = ["label", "chat_template_kwargs"]
        lone = [key for key in QUESTION_KEYS if isinstance(record.get(key), str)]
        is_lone = len(lone) == 1 and not any(record.get(key) for key in ANSWER_KEYS)
        left_out += (*CHOSEN_KEYS, *REJECTED_KEYS) if is_lone else ()
        record = {key: value for key, value in record.items() if key not in left_out}
        if is_lone and find_form(record) is None:
            has_context = lone == ["instruction"] and record.get("context")
            record["response" if has_context else QUESTION_KEYS[lone[0]]] = "…"
    read = read_record(record, source=source, line=line, preference="chosen", counts=counts)
    messages = read["messages"]
    tools = read.get("tools")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RecordError("no_question", "no user message to answer")
    check_messages([*messages, {"role": "assistant", "content": "…"}])
    own = {"tools": tools, "chat_template_kwargs": variables}
    own = {name: value for name, value in own.items() if value}
    return {"messages": messages, **own} if own else messages


def check_questions(
    source: str, system: str | None, check: Callable[[list[dict]], object], counts: FieldCounts | None = None
) -> tuple[int, str]:
    """Read a file once and `check` each conversation; return how many there are and a hash of them all.

    Raises ValueError with file and line for a conversation that can't be answered, before any is answered.
    """
    count = 0
    digest = hashlib.sha256()
    for line, messages in read_questions(source, system, counts):
        try:
            check(messages)
        except ValueError as error:
            raise ValueError(f"{source} line {line}: {error}") from None
        digest.update(json.dumps(messages).encode() + b"\n")
        count += 1
    if not count:
        raise ValueError(f"{source}: no questions in this file")
    return count, digest.hexdigest()


class Partial:
    """The answers so far, in a file that one process at a time may write.

    Raises ValueError when the file holds answers of another run, or another process writes it.
    """

    def __init__(self, path: str | Path, belongs_to: dict):
        self.path = Path(path)
        self.offsets: dict[int, int] = {}  # of each position's line, in bytes
        busy = f"{path}: another process is writing it; wait, or name another output"
        self._log = LineLog(path, busy=busy)
        try:
            self._read(belongs_to)
        except BaseException:
            self._log.close()
            raise

    def _read(self, belongs_to: dict) -> None:
        header = _to_line({"answers_of": belongs_to})
        first = self._log.read_first()
        if not header.startswith(first):
            raise ValueError(_refusal(self.path, first, belongs_to))
        for offset, line in self._log.read():
            if offset:
                self._index(line, offset)
        if first != header:
            self._log.append(header, sync=False)

    def _index(self, line: bytes, offset: int) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line is answered again
            self.offsets[json.loads(line)["position"]] = offset

    def keep(self, position: int, answer: dict) -> None:
        """Append an answer; it stays when this process is killed."""
        self.offsets[position] = self._log.append(_to_line({"position": position, **answer}), sync=False)

    def finish(self, output: str | Path, *, overwrite: bool) -> None:
        """Write the answers to `output` in the order of the questions, and remove this file."""
        with open(self.path, "rb") as lines, open_whole(output, "wb") as stream:
            for position in sorted(self.offsets):
                lines.seek(self.offsets[position])
                answer = json.loads(lines.readline())
                del answer["position"]
                stream.write(_to_line(answer))
            check_output(output, overwrite=overwrite)
        self.path.unlink()

    def close(self) -> None:
        self._log.close()


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise ValueError when answers can't go there."""
    if Path(output).is_dir() or not Path(output).absolute().parent.is_dir():
        raise ValueError(f"--output {output}: name a file in a folder that exists")
    if Path(output).exists() and not overwrite:
        raise ValueError(f"--output {output}: exists; add --overwrite to replace it")


def _to_line(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _refusal(path: Path, first: bytes, belongs_to: dict) -> str:
    try:
        found = json.loads(first)["answers_of"]
        changed = ", ".join(name for name in belongs_to if found.get(name) != belongs_to[name])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: not written by sft.chat; move it away, or name another output"
    return (
        f"{path}: holds answers of a run with another {changed}; rerun that run's own command, "
        "or delete the file to begin anew"
    )


def answer_missing(
    partial: Partial,
    questions: Iterable[tuple[object, Asked]],
    reply_each: Callable[[Iterable[tuple[int, Asked]]], Iterator[tuple[int, object]]],
) -> Iterator[object]:
    """Answer every question that is not in `partial`, in the order in which the replies end; yield each reply."""
    asked: dict[int, Asked] = {}

    def missing() -> Iterator[tuple[int, Asked]]:
        for position, (_line_number, messages) in enumerate(questions):
            if position not in partial.offsets:
                asked[position] = messages
                yield position, messages

    for position, reply in reply_each(missing()):
        question = asked.pop(position)
        own = question if isinstance(question, dict) else {}
        message = reply.message or {"role": "assistant", "content": reply.text}
        if not reply.ended:  # as training data it would teach to stop there
            message = {**message, "train": False}
        messages = [*messages_of(question), message]
        partial.keep(position, {**own, "messages": messages, "ended": reply.ended, "num_tokens": reply.num_tokens})
        yield reply


def hash_weights(model) -> str:
    """Return a hash of some numbers of every weight; another checkpoint, dtype or adapter has another hash."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 256)]
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_date(path: str) -> date | None:
    """Return the date that the chat template wrote into the prompts of the answers so far."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as lines:
        return date.fromisoformat(json.loads(lines.readline())["answers_of"]["date"])
    return None


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
    far stay in OUTPUT.partial; the same call resumes from it.
    """
    from tqdm import tqdm

    check_output(output, overwrite=overwrite)
    if Path(output).exists() and Path(output).samefile(source):
        raise ValueError(f"--output {output}: is the file of questions")
    if chat.renderer.writes_date and (day := _read_date(f"{output}.partial")):
        chat = replace(chat, renderer=chat.renderer.on_day(day))
    counts = FieldCounts()
    count, questions = check_questions(source, system, chat.prompt_ids, counts)
    if counts.unread:
        print(f"{source}: not read: {list_counts(counts.unread)}", flush=True)
    belongs_to = {"questions": questions, "model": hash_weights(chat.model), "sampling": asdict(sampling), "seed": seed}
    belongs_to |= {"tools": chat.tools} if chat.tools else {}
    belongs_to |= {"thinking": chat.thinking} if chat.thinking is not None else {}
    belongs_to |= {"date": chat.renderer.today.isoformat()} if chat.renderer.writes_date else {}
    belongs_to["chat format"] = chat.renderer.fingerprint()[:16]
    with closing(Partial(f"{output}.partial", belongs_to)) as partial:
        check_output(output, overwrite=overwrite)  # another process may have just written it
        missing = answer_missing(
            partial,
            read_questions(source, system),
            lambda asked: chat.reply_each(asked, sampling, at_once=batch_size, seed=seed),
        )
        with tqdm(total=count, initial=len(partial.offsets), unit="reply", dynamic_ncols=True) as bar:
            for _ in missing:
                bar.update()
        partial.finish(output, overwrite=overwrite)
    return count
