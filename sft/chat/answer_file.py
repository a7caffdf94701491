"""Answers a file of questions: all are checked before the first is answered, and each answer is kept as it comes.

    OUTPUT.partial    {"answers_of": {"questions": "5d…", "model": "a0…", "sampling": …}}     what they belong to
                      {"position": 1, "messages": […], "ended": true, …}                      in the order they come
                      {"position": 0, "messages": […], …
    OUTPUT            the same lines in the order of the questions, once all are there

A run that was killed goes on with the same command: only a last line that was cut off is answered again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sft.files import LineLog, open_whole
from sft.opendata.conversation import SYSTEM_KEYS, RecordError, read_file, read_record, validate

ASKING, ANSWERING = (
    ("prompt", "instruction", "query", "question"),
    ("input", "output", "completion", "response", "answer"),
)


def read_questions(source: str, system: str | None = None) -> Iterator[tuple[int | str, list[dict]]]:
    """Yield each record's line and its messages, `system` in front where they have none.

    Raises ValueError with file and line for the first record that holds no question.
    """
    for raw in read_file(source):
        try:
            if raw.error:
                raise raw.error
            messages = to_prompt(raw.record, source=source, line=raw.line)
        except RecordError as error:
            raise ValueError(f"{source} line {raw.line}: {error}") from None
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        yield raw.line, messages


def to_prompt(record: object, *, source: str = "record", line: int | str = 1) -> list[dict]:
    """Read a question: a record of any raw form, without its last reply, or an object with a lone prompt."""
    if isinstance(record, dict) and not any(record.get(key) for key in ANSWERING):
        lone = [record[key] for key in ASKING if isinstance(record.get(key), str)]
        if len(lone) == 1:
            record = {key: record[key] for key in SYSTEM_KEYS if key in record}
            record["messages"] = [{"role": "user", "content": lone[0]}]
    messages = read_record(record, source=source, line=line)["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise RecordError("no_question", "no user message to answer")
    validate({"messages": [*messages, {"role": "assistant", "content": "…"}]})
    return messages


def check_questions(source: str, system: str | None, check: Callable[[list[dict]], object]) -> tuple[int, str]:
    """Read a file once and `check` each conversation; return how many there are and a hash of them all.

    Raises ValueError with file and line for what can't be answered, so that nobody learns of it after a night.
    """
    count, digest = 0, hashlib.sha256()
    for line, messages in read_questions(source, system):
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
    """The answers that are there so far, in a file that one process at a time may write.

    Raises ValueError when the file holds answers of another run, or another process writes it.
    """

    def __init__(self, path: str | Path, belongs_to: dict):
        self.path, self.places = Path(path), {}  # position -> where its line starts
        busy = f"{path}: another process is writing it; wait, or name another output"
        self._log = LineLog(path, busy=busy)
        try:
            self._read(belongs_to)
        except BaseException:
            self._log.close()
            raise

    def _read(self, belongs_to: dict) -> None:
        header = _line({"answers_of": belongs_to})
        first = self._log.read_first()
        if not header.startswith(first):
            raise ValueError(_refusal(self.path, first, belongs_to))
        for offset, line in self._log.read():
            if offset:
                self._note(line, offset)
        if first != header:
            self._log.append(header, sync=False)

    def _note(self, line: bytes, place: int) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line is answered again
            self.places[json.loads(line)["position"]] = place

    def keep(self, position: int, answer: dict) -> None:
        """Append an answer; it survives the end of this process, however that comes."""
        self.places[position] = self._log.append(_line({"position": position, **answer}), sync=False)

    def finish(self, output: str | Path, *, overwrite: bool) -> None:
        """Write the answers to `output` in the order of the questions, and remove this file."""
        with open(self.path, "rb") as lines, open_whole(output, "wb") as stream:
            for position in sorted(self.places):
                lines.seek(self.places[position])
                answer = json.loads(lines.readline())
                del answer["position"]
                stream.write(_line(answer))
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


def _line(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _refusal(path: Path, first: bytes, belongs_to: dict) -> str:
    try:
        found = json.loads(first)["answers_of"]
        changed = ", ".join(name for name in belongs_to if found.get(name) != belongs_to[name])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: not written by sft.chat; move it away, or name another output"
    return (
        f"{path}: holds answers of a run with another {changed}; go on with that run's own command, "
        "or delete the file to begin anew"
    )


def answer_missing(
    partial: Partial,
    questions: Iterable[tuple[object, list[dict]]],
    reply_each: Callable[[Iterable[tuple[int, list[dict]]]], Iterator[tuple[int, object]]],
) -> Iterator[object]:
    """Have every question answered that is not in `partial`, in whatever order replies come; yield each reply."""
    asked: dict[int, list[dict]] = {}

    def missing() -> Iterator[tuple[int, list[dict]]]:
        for position, (_line_number, messages) in enumerate(questions):
            if position not in partial.places:
                asked[position] = messages
                yield position, messages

    for position, reply in reply_each(missing()):
        answer = [*asked.pop(position), {"role": "assistant", "content": reply.text}]
        partial.keep(position, {"messages": answer, "ended": reply.ended, "num_tokens": reply.num_tokens})
        yield reply
