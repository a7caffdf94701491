"""From files to raw records: JSON, JSON Lines, CSV, TSV and Parquet, all or a sample, in bounded memory.

One broken record is an error with its line and reason; the records around it are kept.
"""

import csv
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from sft.opendata import decoding
from sft.opendata.decoding import (
    Range,
    TextWindow,
    check_encoding,
    check_kind,
    choose_codec,
    decode_chunks,
    find_compression,
    malformed_json,
    parse_record,
    read_chunks,
    record_decoder,
)
from sft.opendata.fields import CHOSEN_KEYS, PAIRS, RecordError, drop_nulls, find_form, has_lone_surrogate

# The largest record in characters (up to 64 MiB in UTF-8), and how much of a broken part is kept as its raw text.
MAX_RECORD_CHARACTERS = 16 << 20
MAX_RAW_CHARACTERS = 1 << 20
# Characters that are enough to tell a cut escape, literal or exponent from a broken one.
LOOKAHEAD_CHARACTERS = 12


class RawRecord(NamedTuple):
    """A record as read from its file. `place` is its line, or `line.n` for the n-th record that starts on a line."""

    line: int
    place: str
    raw: str
    record: object = None
    error: RecordError | None = None

    def parse(self) -> object:
        """Return the record. Raises RecordError."""
        if self.error:
            raise self.error
        return parse_record(self.raw) if self.record is None else self.record


def split_file(
    path: str | os.PathLike,
    *,
    encoding: str = "utf-8",
    open_file: Callable[[], BinaryIO] | None = None,
    parse: bool = False,
) -> Iterator[RawRecord]:
    """Stream the records of a JSON, JSON Lines, CSV, TSV (each maybe compressed) or Parquet file in bounded memory.

    `encoding` is that of files which are not UTF-8. `open_file` opens a file that is not on this machine; `path` then
    only names it. With `parse`, a record that gives no cause for a second look comes with its `record`; the others are
    parsed later, maybe in another process. A fault of one record is its own; ValueError is for the file as a whole:
    missing, unreadable, or plainly in another encoding.
    """
    check_encoding(encoding)
    try:
        with (open_file or functools.partial(open, path, "rb"))() as stream:
            magic = stream.read(512)
            stream.seek(0)
            if magic.startswith(b"PAR1"):
                yield from _split_parquet(stream)
            else:
                yield from _split_bytes(stream, os.fspath(path), magic, encoding, parse)
    except RecordError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class WrongCut(Exception):
    """A record reaches over the end of a range, or an array ends in it: the file has to be read as a stream from it."""


def split_range(piece: Range) -> Iterator[RawRecord]:
    """Yield the records of a range as `split_file` yields those of the file, parsed. WrongCut comes last."""
    with open(piece.path, "rb") as stream:
        yield from _split_text(
            TextWindow(decode_chunks(piece.read(stream), "utf-8"), piece.line), parse=True, piece=piece
        )


def split_rest(piece: Range, *, parse: bool) -> Iterator[RawRecord]:
    """Yield the records from the beginning of a range to the end of the file, as `split_file` does."""
    with open(piece.path, "rb") as stream:
        stream.seek(piece.start)
        text = TextWindow(decode_chunks(read_chunks(stream, None, decoding.CHUNK_BYTES), "utf-8"), piece.line)
        yield from _split_text(text, parse=parse, piece=piece._replace(end_line=None))


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
                record = {key: drop_nulls(value) for key, value in record.items()}
                raw = json.dumps(record, ensure_ascii=False, default=lambda value: {"parquet": repr(value)})
                yield RawRecord(row, str(row), raw)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"not a readable Parquet file after row {row}: {str(error).splitlines()[0]}") from error


def _split_bytes(stream: BinaryIO, path: str, magic: bytes, encoding: str, parse: bool) -> Iterator[RawRecord]:
    """Decompress and decode a file, and split its text into records: rows of a table, or JSON values."""
    compression = find_compression(magic)
    chunks = read_chunks(stream, compression, decoding.CHUNK_BYTES)
    first = []
    fault = None
    try:
        while sum(map(len, first)) < decoding.PROBE_BYTES and (chunk := next(chunks, b"")):
            first.append(chunk)
    except RecordError as error:
        fault = error
    head = b"".join(first)
    check_kind(head)
    text = TextWindow(decode_chunks(_chain_chunks(first, chunks, fault), choose_codec(head, encoding)))
    table = _find_table(text, path)
    yield from _split_table(text, *table) if table else _split_text(text, parse)


def _chain_chunks(first: list[bytes], rest: Iterator[bytes], fault: RecordError | None) -> Iterator[bytes]:
    yield from first
    if fault:
        raise fault
    yield from rest


# --- Tables: CSV and TSV

_DELIMITERS = ("\t", ",", ";")
_CHOSEN = frozenset(CHOSEN_KEYS)
_QUESTIONS = frozenset(form.keys[0] for form in PAIRS)


def _find_table(text: TextWindow, path: str) -> tuple[str, list[str]] | None:
    """Return the delimiter and the column names of a table with a header, None for JSON. Raises ValueError.

    A header names the fields of a known form. A file that is called .csv or .tsv without such a header is refused.
    """
    text.grow()
    text.advance(re.compile("[\ufeff\r\n]*").match(text.buffer, text.start).end())
    if text.buffer[text.start : text.start + 100].lstrip()[:1] in ("", "{", "["):
        return None
    while (end := text.buffer.find("\n", text.start)) < 0 and len(text.buffer) < decoding.PROBE_BYTES and text.grow():
        continue
    line = text.buffer[text.start : end if end >= 0 else None].rstrip("\r\n")
    headers = [(delimiter, _split_header(line, delimiter)) for delimiter in _DELIMITERS]
    for delimiter, names in headers:
        record = dict.fromkeys(names, "[{")
        if find_form(record) or (not _CHOSEN.isdisjoint(record) and not _QUESTIONS.isdisjoint(record)):
            if len(record) < len(names):
                raise ValueError(f'this is a table with two columns of one name; its header is "{line[:200]}"')
            text.advance(text.start + len(line))
            return delimiter, names
    if re.search(r"\.[ct]sv(\.\w+)?$", path):
        advice = "name them instruction and output, prompt and completion, or the like"
        raise ValueError(f'this is a table whose header "{line[:200]}" names no known form; {advice}')
    return None


def _split_header(line: str, delimiter: str) -> list[str]:
    try:
        names = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []
    return [name.strip() or f"column {number}" for number, name in enumerate(names, start=1)]


class _Lines:
    """The lines of a text; `taken` are those of the row that is being read."""

    def __init__(self, text: TextWindow):
        self.text = text
        self.taken = []
        self.again = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if sum(map(len, self.taken)) > MAX_RAW_CHARACTERS:
            raise csv.Error("a quote is not closed within a Mi characters")
        line = self.again.pop() if self.again else self._take()
        if not line:
            raise StopIteration
        self.taken.append(line)
        return line

    def _take(self) -> str:
        text = self.text
        while (end := text.buffer.find("\n", text.start)) < 0 and text.grow():
            continue
        return text.take((end + 1 if end >= 0 else len(text.buffer)) - text.start)


def _split_table(text: TextWindow, delimiter: str, names: list[str]) -> Iterator[RawRecord]:
    """The rows of a table as JSON text; a row that can't be read costs its first line only."""
    csv.field_size_limit(MAX_RECORD_CHARACTERS)
    lines = _Lines(text)
    line = text.line
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken = []
        try:
            row = next(reader, None)
            error = None
        except csv.Error as problem:
            row = []
            error = RecordError("malformed_csv", f"{problem}; this is no valid row of a table")
            lines.again += lines.taken[:0:-1]
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            lines.taken = lines.taken[:1]
        if row is None:
            break
        if row and len(row) != len(names):
            advice = f"the row has {len(row)} fields, the header {len(names)}; quote fields that hold a {delimiter!r}"
            error = RecordError("malformed_csv", advice)
        if error:
            yield RawRecord(line, str(line), "".join(lines.taken), error=error)
        elif row:
            yield RawRecord(line, str(line), json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False))
        line += sum(taken.count("\n") for taken in lines.taken)
    if text.fault:
        yield RawRecord(line, str(line), "", error=text.fault)


# --- JSON


# Only finds where a value ends; the parse that counts is parse_record's.
_scan_once = json.JSONDecoder(parse_int=str).scan_once
# A record may begin again inside a broken part: at a brace before a key, here; or a new line that isn't indented.
_RESTART = r"(?<=[\[,}\s])\{(?=\s*\")"
_RESTART_IN_ARRAY = re.compile(_RESTART)
_RESTART_IN_LINES = re.compile(_RESTART + r"|\n(?![ \t\]}])")
_FIRST_KEY = re.compile(r'\{\s*"[^"\\]{0,100}"')


def _split_text(text: TextWindow, parse: bool, piece: Range | None = None) -> Iterator[RawRecord]:
    """Records of an array, one a line, or simply one after another; broken ones come with their error.

    Of a range, only those that begin in it.
    """
    in_array, end_line = (piece.in_array, piece.end_line or math.inf) if piece else (False, math.inf)
    while (char := text.skip()) and text.line < end_line:
        if char in "[]" and in_array == (char == "]"):
            in_array = char == "["
            text.advance(text.start + 1)
            continue
        begin = text.begin()
        length, record = _parse_at_once(text) if parse else (0, None)
        try:
            yield RawRecord(*begin, text.take(length or _find_length(text)), record)
        except RecordError as error:
            raw, error = _take_broken(text, error, in_array=in_array)
            yield RawRecord(*begin, raw, error=error)
            # If that skipped the rest of an array, its closing bracket is skipped too.
            in_array = in_array and text.skip() != ""
        if text.line >= end_line:
            raise WrongCut
    if char:
        if in_array != piece.ends_in_array:
            raise WrongCut
    elif end_line < math.inf:
        raise ValueError("the file became shorter while it was read; run again")
    elif text.fault or in_array:
        unclosed = RecordError("truncated", "the array is not closed, so the end of the file may be missing")
        yield RawRecord(*text.begin(), "", error=text.fault or unclosed)


def _parse_at_once(text: TextWindow) -> tuple[int, object]:
    """Length and value of the object that starts here, or 0 where it has to be looked at more closely."""
    try:
        record, end = record_decoder.scan_once(text.buffer, text.start)
    except (ValueError, StopIteration, RecursionError):
        return 0, None
    length = end - text.start
    usual = (
        type(record) is dict
        and length <= MAX_RECORD_CHARACTERS
        and not (text.has_bad_bytes and has_lone_surrogate(text.buffer[text.start : end]))
    )
    return (length, record) if usual else (0, None)


def _find_length(text: TextWindow) -> int:
    """Length of the JSON value that starts here; reads on while it is incomplete. Raises RecordError."""
    while True:
        length, error = _measure_value(text.buffer, text.start, ended=text.ended)
        num_unread = length or len(text.buffer) - text.start
        if error and error.reason != "truncated":
            raise error
        if num_unread > MAX_RECORD_CHARACTERS:
            raise RecordError(
                "too_large", f"the record is longer than {MAX_RECORD_CHARACTERS >> 20} Mi characters; split it"
            )
        # A number at the end of the buffer may have more digits after it.
        complete = length and text.start + length < len(text.buffer) - LOOKAHEAD_CHARACTERS
        if complete or text.ended:
            if error:
                raise error
            return length
        text.grow()


def _measure_value(buffer: str, start: int, *, ended: bool) -> tuple[int, RecordError | None]:
    """Length of the JSON value at `start`, or the error: `truncated` if more text might complete it."""
    try:
        return _scan_once(buffer, start)[1] - start, None
    except json.JSONDecodeError as error:
        position = error.pos
        message = error.msg
    except StopIteration as error:
        position = error.value
        message = "Expecting value"
    except RecursionError:
        return 0, RecordError("too_deep", "the record is nested too deeply to be a conversation")
    if position >= len(buffer) - (0 if ended else LOOKAHEAD_CHARACTERS) or message.startswith("Unterminated string"):
        return 0, RecordError("truncated", "the record is cut off: its end is missing")
    return 0, malformed_json(message, position - start)


def _take_broken(text: TextWindow, error: RecordError, *, in_array: bool) -> tuple[str, RecordError]:
    """Take what is broken as one record: up to the next good record, and outside an array to the end of its lines."""
    restart = _RESTART_IN_ARRAY if in_array else _RESTART_IN_LINES
    # A record nested too deeply contains many beginnings like its own.
    key = _FIRST_KEY.match(text.buffer, text.start) if error.reason != "too_deep" else None
    head = ""
    at = 1
    while True:
        match = restart.search(text.buffer, text.start + at)
        if match is None or match.end() == len(text.buffer):
            if len(text.buffer) - text.start > MAX_RECORD_CHARACTERS:
                head = head or text.buffer[text.start : text.start + MAX_RAW_CHARACTERS]
                at = 0
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
    error = text.fault or error
    text.fault = None
    return raw.removesuffix("]").rstrip() if in_array else raw, error


def _next_restart(text: TextWindow, offset: int, key: re.Match | None) -> int:
    """0 if a record of a known form, or one that begins like the broken one, is at `offset`; else the next offset."""
    if text.buffer[max(0, text.start + offset - 64) : text.start + offset].rstrip().endswith(":"):
        return offset + 1
    size = 4096
    while True:
        piece = text.buffer[text.start + offset : text.start + offset + size]
        length, error = _measure_value(piece, 0, ended=False)
        if length:
            return offset + length if find_form(_scan_once(piece, 0)[0]) is None else 0
        if error.reason != "truncated" or size > MAX_RECORD_CHARACTERS or (len(piece) < size and not text.grow()):
            if error.reason == "too_deep":
                # No record can start within the next hundreds of brackets.
                return offset + 900
            begins_alike = key and (first := _FIRST_KEY.match(piece)) and first.group() == key.group()
            return 0 if begins_alike else offset + 1
        size *= 8
