"""The first step of the flow: raw files in every known form -> canonical conversations, one record at a time.

A file is split into records (a JSON array, JSON Lines, JSON values one after another, gzip, Parquet) in bounded memory.
A record is read by what it holds, never by its file's name. What can't be read is an error with line and reason, and
the records around it are kept. No text is changed here.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, NotRequired, TypedDict

# The largest record in characters (up to 64 MiB in UTF-8), and how much of a broken stretch is kept as its raw text.
MAX_RECORD = 16 << 20
MAX_RAW = 1 << 20
# Bytes read at a time, and bytes looked at to tell the encoding.
CHUNK = 256 << 10
PROBE = 1 << 20
# Characters that are enough to tell a cut escape, literal or exponent from a broken one.
LOOKAHEAD = 12

EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# Never read as data: what sft.opendata writes beside its conversations, and what the hub keeps beside a data set.
NOT_DATA = ("ledger.json", "rejects.jsonl", "dataset_info.json", "dataset_infos.json")

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
MESSAGE_LISTS = ("messages", "conversations")
SYSTEM_KEYS = ("system", "system_prompt")
# Question, what may come with it, answer. The first row of which question and answer are not null decides.
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("query", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
    ("input", None, "target"),
    ("input", None, "output"),
)
NO_INPUT = {"", "<noinput>", "<no input>", "noinput", "no input", "n/a", "none", "null", "nan", "无", "无输入"}


class Function(TypedDict):
    """The function of a call; `arguments` is an object, never JSON text."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call in an assistant message."""

    id: NotRequired[str]
    type: Literal["function"]
    function: Function


class FunctionDefinition(TypedDict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class Tool(TypedDict):
    """A tool definition of a conversation."""

    type: Literal["function"]
    function: FunctionDefinition


class Message(TypedDict):
    """A message. Role is system, user, assistant or tool; keys that don't apply to the role are absent.

    assistant: `content` may be "" beside `tool_calls`; `train` is absent (trained) or False.
    tool: `content` is the result of the call `tool_call_id`, or of the next call without a result if that is absent.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]


class Conversation(TypedDict):
    """The canonical record: maybe a system message, then user and assistant take turns; the last turn is a reply.

    The results of a reply's calls, one tool message each, come between it and the next reply. `tools` are the
    definitions offered, absent where there are none.
    """

    id: str
    source: str
    messages: list[Message]
    tools: NotRequired[list[Tool]]


class RecordError(ValueError):
    """One record can't be used. `reason` is a short code for ledgers; the text says which field and what to do."""

    def __init__(self, reason: str, message: str):
        # A message that quotes a lone surrogate must still be printable.
        super().__init__(reason, message.encode("utf-8", "backslashreplace").decode())
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


class RawRecord(NamedTuple):
    """A record as it stands in its file. `place` is its line, or `line.n` for the n-th record that starts on a line."""

    line: int
    place: str
    raw: str
    record: object = None
    error: RecordError | None = None


# --- From paths to files


def list_files(path_or_glob: str | os.PathLike) -> list[str]:
    """List the data files of a file, a folder (all the way down) or a glob, sorted.

    In a folder only names with one of `EXTENSIONS` count; hidden files and `NOT_DATA` do not. Raises ValueError when
    nothing is there.
    """
    path = os.fspath(path_or_glob)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = _walk(path)
        if not found:
            raise ValueError(f"{path}: the folder holds no {', '.join(EXTENSIONS)} file")
        return found
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.basename(match) not in NOT_DATA)
    found = {file for match in matches for file in ([match] if os.path.isfile(match) else _walk(match))}
    if not found:
        raise ValueError(f"{path}: no such file or folder, and as a glob it matches no data file")
    return sorted(found)


def split_suffix(text: str) -> tuple[str, str]:
    """`x.json@20000` -> ("x.json", "20000"), without a suffix ("x.json", ""). A path that exists is taken as it is."""
    path, at, suffix = text.rpartition("@")
    return (text, "") if not at or "/" in suffix or os.path.exists(text) or glob.glob(text) else (path, suffix)


def _walk(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if name.endswith(EXTENSIONS) and name not in NOT_DATA]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


# --- From files to raw records


def read_conversations(
    paths: Iterable[str | os.PathLike], *, encoding: str = "utf-8", reasoning: str = "drop"
) -> Iterator[tuple[Conversation | None, RecordError | None, str, int]]:
    """Read files of any known form as valid conversations; nothing is cleaned.

    Yields (conversation, None, file, line) or (None, error, file, line). Raises ValueError for a file as a whole.
    """
    for path in map(os.fspath, paths):
        source = os.path.basename(path)
        for raw in read_file(path, encoding=encoding):
            try:
                if raw.error:
                    raise raw.error
                conversation = read_record(raw.record, source=source, line=raw.place, reasoning=reasoning)
                validate(conversation)
                yield conversation, None, path, raw.line
            except RecordError as error:
                yield None, error, path, raw.line


def read_file(path: str | os.PathLike, *, encoding: str = "utf-8") -> Iterator[RawRecord]:
    """Stream the records of a JSON, JSON Lines (each also gzipped) or Parquet file in bounded memory.

    `encoding` is that of files which are not UTF-8. What is wrong with one record comes in its `error`; ValueError is
    for the file as a whole: missing, unreadable, or plainly in another encoding.
    """
    for raw in split_file(path, encoding=encoding, parse=True):
        if raw.error or raw.record is not None:
            yield raw
            continue
        try:
            yield raw._replace(record=parse_record(raw.raw))
        except RecordError as error:
            yield raw._replace(error=error)


def split_file(
    path: str | os.PathLike,
    *,
    encoding: str = "utf-8",
    open_file: Callable[[], BinaryIO] | None = None,
    parse: bool = False,
) -> Iterator[RawRecord]:
    """Like `read_file`, but leave each record unparsed: its `raw` is for `parse_record`, maybe in another process.

    `open_file` opens a file that is not on this machine; `path` then only names it. With `parse`, a record that gives
    no cause for a second look comes with its `record`.
    """
    check_encoding(encoding)
    try:
        with (open_file or functools.partial(open, path, "rb"))() as stream:
            magic = stream.read(4)
            stream.seek(0)
            if magic == b"PAR1":
                yield from _split_parquet(stream)
                return
            zipped = magic.startswith(b"\x1f\x8b")
            head = b""
            with contextlib.suppress(RecordError):
                head = next(_read_chunks(stream, zipped, PROBE), b"")
            codec = _choose_codec(head, encoding)
            stream.seek(0)
            yield from _split_text(_Text(_decode(_read_chunks(stream, zipped, CHUNK), codec)), parse)
    except RecordError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_file(path: str | os.PathLike, *, encoding: str = "utf-8") -> None:
    """Raise ValueError if the file as a whole can't be read: missing, no permission, or plainly in another encoding."""
    for _ in split_file(path, encoding=encoding):
        return


def _split_parquet(stream: BinaryIO) -> Iterator[RawRecord]:
    """Rows as JSON text; what JSON does not have (dates, bytes) becomes an object, which no reader takes for a text."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                row += 1
                raw = json.dumps(record, ensure_ascii=False, default=lambda value: {"parquet": repr(value)})
                yield RawRecord(row, str(row), raw)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"not a readable Parquet file after row {row}: {str(error).splitlines()[0]}") from error


def check_encoding(encoding: str) -> None:
    """Raise ValueError unless Python knows a text encoding of this name."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ValueError(f"--encoding {encoding}: unknown; use utf-8, gb18030, big5, utf-16 or the like") from error


def _choose_codec(head: bytes, encoding: str) -> str:
    """The codec to read with. Raises ValueError, naming the likely encoding, when UTF-8 is plainly wrong."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    num_bad = len(text) - len(text.encode("utf-8", "ignore").decode())
    num_good = len(text) - len(text.encode("ascii", "ignore")) - num_bad
    name = codecs.lookup(encoding).name
    if not name.startswith("utf-8") and not head.startswith(codecs.BOM_UTF8) and (num_bad or num_good < 8):
        return name
    # JSON begins with ASCII, so its first bytes tell UTF-16 and UTF-32; two NULs are rather a damaged file.
    likely = json.detect_encoding(head[:4]) if head[:2].strip(b"\0") else "utf-8"
    if num_bad >= 8 and num_bad > num_good and likely.startswith("utf-8"):
        likely = _guess_encoding(head)
    if not likely.startswith("utf-8"):
        raise ValueError(f"not UTF-8 text, it looks like {likely}; read it with --encoding {likely}, or convert it")
    return "utf-8"


def _guess_encoding(head: bytes) -> str:
    """The encoding in which most of the commonest characters turn up."""

    def num_common(name: str) -> int:
        text = head[: PROBE // 8].decode(name, errors="replace")
        return len(re.findall("[的是不了在有我这為這個のはがをにの는이의을에]", text)) - text.count("\ufffd")

    best = max(("gb18030", "big5", "shift_jis", "euc_kr"), key=num_common)
    return best if num_common(best) > 0 else "cp1252"


def _escape_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Like surrogateescape, which raises where a stray byte is ASCII, as happens in GB18030 and UTF-16."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("sft_escape", _escape_undecodable)


def _read_chunks(stream: BinaryIO, zipped: bool, size: int) -> Iterator[bytes]:
    """Bytes, unzipped; a damaged gzip file gives what can be had and then a RecordError."""
    read = gzip.GzipFile(fileobj=stream).read1 if zipped else stream.read
    try:
        while data := read(size):
            yield data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError("damaged_gzip", f"the gzip file is damaged from here on ({error}); fetch it again") from error


def _decode(chunks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """Text, with undecodable bytes as lone surrogates; a RecordError comes last."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if encoding == "utf-8" else "sft_escape")
    fault = None
    try:
        for chunk in chunks:
            yield decoder.decode(chunk)
    except RecordError as error:
        fault = error
    yield decoder.decode(b"", final=True)
    if fault:
        raise fault


class _Text:
    """A window on decoded text: `buffer[start:]` is unread, `start` is on line `line` of the file."""

    def __init__(self, chunks: Iterator[str]):
        self.chunks, self.buffer, self.start, self.line = chunks, "", 0, 1
        self.ended, self.fault = False, None
        self.last_line, self.num_on_line = 0, 0

    def grow(self) -> bool:
        """Read on, at least as much as is unread: trying again stays linear. False, and no change, at the end."""
        parts, num_new = [self.buffer[self.start :]], 0
        wanted = max(1, len(parts[0]))
        while num_new < wanted and not self.ended:
            try:
                parts.append(next(self.chunks))
                num_new += len(parts[-1])
            except StopIteration:
                self.ended = True
            except RecordError as error:
                self.ended, self.fault = True, error
        if num_new:
            self.buffer, self.start = "".join(parts), 0
        return num_new > 0

    def skip(self) -> str:
        """Pass over what may stand between records; the next character, or "" at the end."""
        while True:
            self.advance(SEPARATORS.match(self.buffer, self.start).end())
            if self.start < len(self.buffer):
                return self.buffer[self.start]
            if not self.grow():
                return ""

    def advance(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.start, end)
        self.start = end

    def begin(self) -> tuple[int, str]:
        """Line and place of the record that begins here."""
        self.num_on_line = self.num_on_line + 1 if self.line == self.last_line else 1
        self.last_line = self.line
        return self.line, str(self.line) if self.num_on_line == 1 else f"{self.line}.{self.num_on_line}"

    def take(self, length: int) -> str:
        raw = self.buffer[self.start : self.start + length]
        self.advance(self.start + length)
        return raw


# A comma after a record is forgiven outside an array, and a missing one inside; files are glued together BOM and all.
SEPARATORS = re.compile(r"[ \t\r\n,\ufeff]*")
# Only finds where a value ends; the parse that counts is parse_record's.
_scan_once = json.JSONDecoder(parse_int=str).scan_once
# Where a record may begin inside a broken stretch: a brace before a key, here; or a new line that isn't indented.
_RESTART = r"(?<=[\[,}\s])\{(?=\s*\")"
_RESTART_IN_ARRAY = re.compile(_RESTART)
_RESTART_IN_LINES = re.compile(_RESTART + r"|\n(?![ \t\]}])")
_FIRST_KEY = re.compile(r'\{\s*"[^"\\]{0,100}"')


def _split_text(text: _Text, parse: bool) -> Iterator[RawRecord]:
    """Records of an array, one a line, or simply one after another; broken ones come with their error."""
    in_array = False
    while char := text.skip():
        if char in "[]" and in_array == (char == "]"):
            in_array = char == "["
            text.advance(text.start + 1)
            continue
        begin = text.begin()
        length, record = _parse_at_once(text) if parse else (0, None)
        if length:
            yield RawRecord(*begin, text.take(length), record)
            continue
        try:
            yield RawRecord(*begin, text.take(_scan(text)))
        except RecordError as error:
            raw, error = _take_broken(text, error, in_array=in_array)
            yield RawRecord(*begin, raw, error=error)
            # Where that took the rest of an array, its closing bracket is gone too.
            in_array = in_array and text.skip() != ""
    if text.fault or in_array:
        unclosed = RecordError("truncated", "the array is not closed, so the end of the file may be missing")
        yield RawRecord(*text.begin(), "", error=text.fault or unclosed)


def _parse_at_once(text: _Text) -> tuple[int, object]:
    """Length and value of the object that starts here, or 0 where it has to be looked at more closely."""
    try:
        record, end = _decoder.scan_once(text.buffer, text.start)
    except (ValueError, StopIteration, RecursionError):
        return 0, None
    length = end - text.start
    usual = type(record) is dict and length <= MAX_RECORD and not _is_broken(text.buffer[text.start : end])
    return (length, record) if usual else (0, None)


def _scan(text: _Text) -> int:
    """Length of the JSON value that starts here; reads on while it is incomplete. Raises RecordError."""
    while True:
        length, error = _measure(text.buffer, text.start, ended=text.ended)
        num_unread = length or len(text.buffer) - text.start
        if error and error.reason != "truncated":
            raise error
        if num_unread > MAX_RECORD:
            raise RecordError("too_large", f"the record is longer than {MAX_RECORD >> 20} Mi characters; split it")
        # A number close to the end of the buffer may go on behind it.
        complete = length and text.start + length < len(text.buffer) - LOOKAHEAD
        if complete or text.ended:
            if error:
                raise error
            return length
        text.grow()


def _measure(buffer: str, start: int, *, ended: bool) -> tuple[int, RecordError | None]:
    """Length of the JSON value at `start`, or the error: `truncated` if more text might complete it."""
    try:
        return _scan_once(buffer, start)[1] - start, None
    except json.JSONDecodeError as error:
        position, message = error.pos, error.msg
    except StopIteration as error:
        position, message = error.value, "Expecting value"
    except RecursionError:
        return 0, RecordError("too_deep", "the record is nested too deeply to be a conversation")
    if position >= len(buffer) - (0 if ended else LOOKAHEAD) or message.startswith("Unterminated string"):
        return 0, RecordError("truncated", "the record is cut off: its end is missing")
    return 0, _malformed(message, position - start)


def _malformed(message: str, position: int) -> RecordError:
    # Some of json's messages end in "at" already.
    where = f"{message.removesuffix(' at')} at character {position + 1} of the record"
    return RecordError("malformed_json", f"{where}; this is not valid JSON")


def _take_broken(text: _Text, error: RecordError, *, in_array: bool) -> tuple[str, RecordError]:
    """Take what is broken as one record: up to the next good record, and outside an array to the end of its lines."""
    restart = _RESTART_IN_ARRAY if in_array else _RESTART_IN_LINES
    # What is nested too deeply is full of beginnings like its own.
    key = _FIRST_KEY.match(text.buffer, text.start) if error.reason != "too_deep" else None
    head, at = "", 1
    while True:
        match = restart.search(text.buffer, text.start + at)
        if match is None or match.end() == len(text.buffer):
            if len(text.buffer) - text.start > MAX_RECORD:
                head, at = head or text.buffer[text.start : text.start + MAX_RAW], 0
                text.advance(len(text.buffer) - 1)
            if text.grow():
                continue
        if match is None:
            break
        length = match.start() - text.start
        at = _next_restart(text, length, key) if match.group() == "{" else 0
        if not at:
            return (head + text.take(length).rstrip(", \t\r\n"))[:MAX_RAW], error
    raw = (head + text.take(len(text.buffer) - text.start)).rstrip(", \t\r\n")[:MAX_RAW]
    error, text.fault = text.fault or error, None
    return raw.removesuffix("]").rstrip() if in_array else raw, error


def _next_restart(text: _Text, offset: int, key: re.Match | None) -> int:
    """0 if a record of a known form, or one that begins like the broken one, is at `offset`; else where to go on."""
    if text.buffer[max(0, text.start + offset - 64) : text.start + offset].rstrip().endswith(":"):
        return offset + 1
    size = 4096
    while True:
        piece = text.buffer[text.start + offset : text.start + offset + size]
        length, error = _measure(piece, 0, ended=False)
        if length:
            return offset + length if _find_form(_scan_once(piece, 0)[0]) is None else 0
        if error.reason != "truncated" or size > MAX_RECORD or (len(piece) < size and not text.grow()):
            if error.reason == "too_deep":
                # Nothing good can start within the next hundreds of brackets.
                return offset + 900
            begins_alike = key and (first := _FIRST_KEY.match(piece)) and first.group() == key.group()
            return 0 if begins_alike else offset + 1
        size *= 8


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordError("duplicate_key", f'key "{key}" stands twice in one object; keep one')
    return record


# NaN is what pandas writes where a concatenated table has no value.
_decoder = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=lambda name: None if name == "NaN" else float(name)
)


def parse_record(raw: str) -> object:
    """Parse the raw text of one record. Raises RecordError."""
    if _is_broken(raw):
        position = next(i for i, char in enumerate(raw) if "\ud800" <= char <= "\udfff")
        byte = ord(raw[position]) - 0xDC00
        message = f"byte 0x{byte & 0xFF:02x} at character {position + 1} is not text; fix it or give --encoding"
        raise RecordError("encoding", message)
    try:
        return _decoder.decode(raw)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        raise _malformed(error.msg, error.pos) from error
    except RecursionError as error:
        raise RecordError("too_deep", "the record is nested too deeply to be a conversation") from error
    except ValueError as error:
        raise RecordError("huge_number", f"a number has too many digits; write it as a string ({error})") from error


def _is_broken(text: str) -> bool:
    """Whether there is a lone surrogate, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- From raw records to conversations


def read_record(
    record: object, *, source: str, line: int | str, reasoning: str = "drop", notes: Counter[str] | None = None
) -> Conversation:
    """Read a record of any known form, chosen by the keys that are not null and what they hold. Raises RecordError.

    Its own id is kept, else it is `source:line`. `reasoning` is what to do with `reasoning_content`: "drop" it, or
    "keep" it as `<think>` text before the reply. What is worth knowing but no error is counted in `notes`. Contents may
    still be empty and roles out of order: that is for `validate`, or for cleaning.
    """
    if not isinstance(record, dict):
        raise RecordError("not_object", f"the record is {_kind(record)}; write it as an object with named fields")
    if record.keys() == _OWN_KEYS and (messages := _own_messages(record["messages"])):
        return {
            "id": _read_id(record["id"]) or f"{source}:{line}",
            "source": _own_source(record["source"]) or source,
            "messages": messages,
        }
    notes = Counter() if notes is None else notes
    form = _find_form(record)
    if form is None:
        raise _unknown_form(record)
    messages = [
        {"role": "system", "content": _text(record[key], key)}
        for key in SYSTEM_KEYS
        if record.get(key) not in (None, "")
    ]
    if isinstance(form, str):
        messages += _read_messages(record[form], form, reasoning, notes)
    elif isinstance(record[form[0]], list):
        messages += _read_prompt_and_completion(record, form, reasoning, notes)
    else:
        messages += _read_pair(record, form, notes)
    own = record.keys() == _OWN_KEYS and _own_source(record["source"])
    return {"id": _read_id(record.get("id")) or f"{source}:{line}", "source": own or source, "messages": messages}


# Only our own files have exactly these keys; theirs is the source that counts.
_OWN_KEYS = {"id", "source", "messages"}
_OWN_ROLES = {"system", "user", "assistant"}


def _own_source(source: object) -> str:
    return source if isinstance(source, str) and not _is_broken(source) else ""


def _own_messages(messages: object) -> list[Message] | None:
    """The messages as they are if all have just a known role and a text, or None: then each is read with care."""
    usual = type(messages) is list and all(
        type(message) is dict
        and message.keys() == {"role", "content"}
        and type(message["role"]) is type(message["content"]) is str
        and message["role"] in _OWN_ROLES
        and not _is_broken(message["content"])
        for message in messages
    )
    return messages if usual else None


def validate(conversation: Conversation) -> None:
    """Raise RecordError unless user and assistant take turns after an optional system message, with no text empty."""
    messages = conversation["messages"]
    if not messages:
        raise RecordError("empty", "messages is empty; give at least one user and one assistant message")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns, start=len(messages) - len(turns)):
        expected = "assistant" if (number - len(messages) + len(turns)) % 2 else "user"
        if message["role"] != expected:
            found = f'messages[{number}] has role "{message["role"]}"'
            raise RecordError("role_order", f"{found} where {expected} should speak; user and assistant take turns")
    if len(turns) % 2 or not turns:
        raise RecordError("role_order", "the last message is not the assistant's; end with a reply")
    for number, message in enumerate(messages):
        if not _text(message["content"], f"messages[{number}].content").strip():
            raise RecordError("empty", f"messages[{number}].content is empty; give a text or leave the record out")


def _find_form(record: object) -> str | tuple | None:
    """The key of a message list, or a row of PAIRS."""
    if not isinstance(record, dict):
        return None
    lists = [key for key in MESSAGE_LISTS if isinstance(record.get(key), list)]
    pairs = [pair for pair in PAIRS if record.get(pair[0]) is not None and record.get(pair[2]) is not None]
    filled = [key for key in lists if record[key]]
    return next(iter(filled + pairs + lists), None)


def _unknown_form(record: dict) -> RecordError:
    for question, _, answer in PAIRS:
        if question in record and answer in record:
            null = question if record[question] is None else answer
            return RecordError("null_field", f"{null} is null; give a text or leave the record out")
    for key, value in record.items():
        if isinstance(value, list) and value and _find_form(value[0]) is not None:
            advice = f"write its elements as an array or as JSON Lines, e.g. jq -c '.{key}[]'"
            return RecordError("nested", f'the records are inside "{key}"; {advice}')
    keys = ", ".join(f'"{key}"' for key, value in list(record.items())[:8] if value is not None) or "no values"
    known = ", ".join([*MESSAGE_LISTS, *dict.fromkeys(f"{pair[0]}/{pair[2]}" for pair in PAIRS)])
    return RecordError("unknown_form", f"no known form has {keys[:200]}; use one of {known}")


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        if value is None:
            raise RecordError("null_field", f"{where} is null; give a text or leave the record out")
        raise RecordError("not_text", f"{where} is {_kind(value)}; write it as a string")
    if _is_broken(value):
        position, char = next((i, char) for i, char in enumerate(value) if "\ud800" <= char <= "\udfff")
        found = f"a lone surrogate (\\u{ord(char):04x}) at character {position + 1}"
        raise RecordError("lone_surrogate", f"{where} has {found}, half of a character; fix the text")
    return value


def _read_id(value: object) -> str:
    usable = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value) if usable and not _is_broken(str(value)) else ""


def _read_messages(items: list, where: str, reasoning: str, notes: Counter[str]) -> list[Message]:
    return [_read_message(item, f"{where}[{number}]", reasoning, notes) for number, item in enumerate(items)]


def _read_message(item: object, where: str, reasoning: str, notes: Counter[str]) -> Message:
    if not isinstance(item, dict):
        raise RecordError("not_object", f'{where} is {_kind(item)}; write it as an object with "role" and "content"')
    role = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(role, str) or role not in ROLES:
        shown = json.dumps(role)[:80]
        raise RecordError("unknown_role", f"{where} has role {shown}; use system, user or assistant")
    key = "content" if item.get("content") is not None or "value" not in item else "value"
    content = _read_content(item.get(key), f"{where}.{key}")
    thoughts = item.get("reasoning_content")
    if ROLES[role] == "assistant" and thoughts not in (None, ""):
        notes["reasoning_dropped" if reasoning == "drop" else "reasoning_kept"] += 1
        if reasoning == "keep":
            content = f"<think>\n{_text(thoughts, f'{where}.reasoning_content')}\n</think>\n\n{content}"
    message: Message = {"role": ROLES[role], "content": content}
    if item.get("train") is False or item.get("weight") == 0:
        message["train"] = False
    return message


def _read_content(value: object, where: str) -> str:
    """A text, or a list of text parts, joined."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise RecordError(
                "content_part", f"{where}[{number}] is of type {json.dumps(kind)[:80]}; only text is read"
            )
        texts.append(_text(part.get("text"), f"{where}[{number}].text"))
    return "".join(texts)


def _read_prompt_and_completion(record: dict, form: tuple, reasoning: str, notes: Counter[str]) -> list[Message]:
    """TRL's conversational form: both are lists of messages, and only the completion is learned."""
    question, _, answer = form
    if not isinstance(record[answer], list):
        raise RecordError("not_text", f"{question} is a list of messages and {answer} is not; write both alike")
    prompt = _read_messages(record[question], question, reasoning, notes)
    prompt = [message | {"train": False} if message["role"] == "assistant" else message for message in prompt]
    return prompt + _read_messages(record[answer], answer, reasoning, notes)


def _read_pair(record: dict, form: tuple, notes: Counter[str]) -> list[Message]:
    question, context, answer = form
    asked, reply = _text(record[question], question), _text(record[answer], answer)
    extra = _text(record[context], context) if context and record.get(context) is not None else ""
    if extra.strip().casefold() not in NO_INPUT:
        asked = f"{asked}\n{extra}" if asked else extra
    elif extra.strip():
        notes["input_placeholder"] += 1
    turns = _read_belle_turns(asked, question, notes)
    return [*_read_history(record.get("history")), *turns, {"role": "assistant", "content": reply}]


def _read_history(history: object) -> list[Message]:
    """LLaMA-Factory's alpaca: earlier turns as [[question, answer], ...]."""
    messages: list[Message] = []
    if history is None:
        return messages
    if not isinstance(history, list):
        raise RecordError("not_text", f"history is {_kind(history)}; write it as a list of [question, answer]")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("not_text", f"history[{number}] is not a list of two strings; write [question, answer]")
        for role, text, index in zip(("user", "assistant"), pair, (0, 1), strict=True):
            messages.append({"role": role, "content": _text(text, f"history[{number}][{index}]")})
    return messages


_BELLE_MARKER = re.compile(r"^(Human|Assistant):", re.MULTILINE)


def _read_belle_turns(text: str, where: str, notes: Counter[str]) -> list[Message]:
    r"""Belle's turns in one text, "Human:问\nAssistant:答\nHuman:问\nAssistant:", as messages; else one user message.

    Markers count at the start of a line and must strictly take turns; a text that begins with Human: but does not end
    in a bare Assistant: is left alone, and noted.
    """
    whole = text.strip()
    if not whole.startswith("Human:"):
        return [{"role": "user", "content": text}]
    if not whole.endswith("\nAssistant:"):
        notes["belle_lookalike"] += 1
        return [{"role": "user", "content": text}]
    _, *parts = _BELLE_MARKER.split(whole)
    markers, bodies = parts[::2], parts[1::2]
    if markers != ["Human", "Assistant"] * (len(markers) // 2):
        order = ", ".join(markers[:8])
        raise RecordError(
            "belle_alternation", f"{where} has the markers {order}; Human: and Assistant: must take turns"
        )
    roles = [{"Human": "user", "Assistant": "assistant"}[marker] for marker in markers]
    # The line breaks and blanks around a body belong to the markers.
    return [{"role": role, "content": body.strip(" \r\n")} for role, body in zip(roles[:-1], bodies[:-1], strict=True)]
