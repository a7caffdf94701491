"""From bytes to raw records: JSON, JSON Lines, gzip, Parquet and other encodings than UTF-8, in bounded memory.

One broken record is an error with its line and reason; the records around it are kept.
"""

import codecs
import contextlib
import functools
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from sft.opendata.fields import RecordError, find_form, has_lone_surrogate, unique_keys

# The largest record in characters (up to 64 MiB in UTF-8), and how much of a broken stretch is kept as its raw text.
MAX_RECORD_CHARACTERS = 16 << 20
MAX_RAW_CHARACTERS = 1 << 20
# Bytes read at a time, and bytes looked at to tell the encoding.
CHUNK_BYTES = 256 << 10
PROBE_BYTES = 1 << 20
# Characters that are enough to tell a cut escape, literal or exponent from a broken one.
LOOKAHEAD_CHARACTERS = 12


class RawRecord(NamedTuple):
    """A record as it stands in its file. `place` is its line, or `line.n` for the n-th record that starts on a line."""

    line: int
    place: str
    raw: str
    record: object = None
    error: RecordError | None = None


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
                head = next(_read_chunks(stream, zipped, PROBE_BYTES), b"")
            codec = _choose_codec(head, encoding)
            stream.seek(0)
            yield from _split_text(_TextWindow(_decode(_read_chunks(stream, zipped, CHUNK_BYTES), codec)), parse)
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


# --- Encodings


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
        text = head[: PROBE_BYTES // 8].decode(name, errors="replace")
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


# --- JSON values in a text


class _TextWindow:
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


def _split_text(text: _TextWindow, parse: bool) -> Iterator[RawRecord]:
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


def _parse_at_once(text: _TextWindow) -> tuple[int, object]:
    """Length and value of the object that starts here, or 0 where it has to be looked at more closely."""
    try:
        record, end = _decoder.scan_once(text.buffer, text.start)
    except (ValueError, StopIteration, RecursionError):
        return 0, None
    length = end - text.start
    usual = (
        type(record) is dict
        and length <= MAX_RECORD_CHARACTERS
        and not has_lone_surrogate(text.buffer[text.start : end])
    )
    return (length, record) if usual else (0, None)


def _scan(text: _TextWindow) -> int:
    """Length of the JSON value that starts here; reads on while it is incomplete. Raises RecordError."""
    while True:
        length, error = _measure(text.buffer, text.start, ended=text.ended)
        num_unread = length or len(text.buffer) - text.start
        if error and error.reason != "truncated":
            raise error
        if num_unread > MAX_RECORD_CHARACTERS:
            raise RecordError(
                "too_large", f"the record is longer than {MAX_RECORD_CHARACTERS >> 20} Mi characters; split it"
            )
        # A number close to the end of the buffer may go on behind it.
        complete = length and text.start + length < len(text.buffer) - LOOKAHEAD_CHARACTERS
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
    if position >= len(buffer) - (0 if ended else LOOKAHEAD_CHARACTERS) or message.startswith("Unterminated string"):
        return 0, RecordError("truncated", "the record is cut off: its end is missing")
    return 0, _malformed(message, position - start)


def _malformed(message: str, position: int) -> RecordError:
    # Some of json's messages end in "at" already.
    where = f"{message.removesuffix(' at')} at character {position + 1} of the record"
    return RecordError("malformed_json", f"{where}; this is not valid JSON")


def _take_broken(text: _TextWindow, error: RecordError, *, in_array: bool) -> tuple[str, RecordError]:
    """Take what is broken as one record: up to the next good record, and outside an array to the end of its lines."""
    restart = _RESTART_IN_ARRAY if in_array else _RESTART_IN_LINES
    # What is nested too deeply is full of beginnings like its own.
    key = _FIRST_KEY.match(text.buffer, text.start) if error.reason != "too_deep" else None
    head, at = "", 1
    while True:
        match = restart.search(text.buffer, text.start + at)
        if match is None or match.end() == len(text.buffer):
            if len(text.buffer) - text.start > MAX_RECORD_CHARACTERS:
                head, at = head or text.buffer[text.start : text.start + MAX_RAW_CHARACTERS], 0
                text.advance(len(text.buffer) - 1)
            if text.grow():
                continue
        if match is None:
            break
        length = match.start() - text.start
        at = _next_restart(text, length, key) if match.group() == "{" else 0
        if not at:
            return (head + text.take(length).rstrip(", \t\r\n"))[:MAX_RAW_CHARACTERS], error
    raw = (head + text.take(len(text.buffer) - text.start)).rstrip(", \t\r\n")[:MAX_RAW_CHARACTERS]
    error, text.fault = text.fault or error, None
    return raw.removesuffix("]").rstrip() if in_array else raw, error


def _next_restart(text: _TextWindow, offset: int, key: re.Match | None) -> int:
    """0 if a record of a known form, or one that begins like the broken one, is at `offset`; else where to go on."""
    if text.buffer[max(0, text.start + offset - 64) : text.start + offset].rstrip().endswith(":"):
        return offset + 1
    size = 4096
    while True:
        piece = text.buffer[text.start + offset : text.start + offset + size]
        length, error = _measure(piece, 0, ended=False)
        if length:
            return offset + length if find_form(_scan_once(piece, 0)[0]) is None else 0
        if error.reason != "truncated" or size > MAX_RECORD_CHARACTERS or (len(piece) < size and not text.grow()):
            if error.reason == "too_deep":
                # Nothing good can start within the next hundreds of brackets.
                return offset + 900
            begins_alike = key and (first := _FIRST_KEY.match(piece)) and first.group() == key.group()
            return 0 if begins_alike else offset + 1
        size *= 8


# --- Parsing


# NaN is what pandas writes where a concatenated table has no value.
_decoder = json.JSONDecoder(
    object_pairs_hook=unique_keys, parse_constant=lambda name: None if name == "NaN" else float(name)
)


def parse_record(raw: str) -> object:
    """Parse the raw text of one record. Raises RecordError."""
    if has_lone_surrogate(raw):
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
