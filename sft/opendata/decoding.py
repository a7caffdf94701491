"""From bytes to text: compression and encodings, and the name of what holds no text."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sft.opendata.fields import RecordError, has_lone_surrogate, unique_keys

# Bytes read at a time, and bytes looked at to tell the encoding.
CHUNK_BYTES = 256 << 10
PROBE_BYTES = 1 << 20
RANGE_BYTES = 1 << 20  # of a file, for one task of a worker
MAX_RANGE_BYTES = 80 << 20  # from a range's start to its end: more than the largest record
MAX_LAST_BYTES = 4 << 20  # of a file's last range; more are read as a stream
SEARCH_BYTES = 64 << 10  # read at a time to find the end of a range
OVERHANG_BYTES = 4 << 10  # read at a time behind a range, for a record that reaches over its end
# Python's own text encodings that no file is written in, as its codecs module lists them.
NOT_OF_FILES = ("idna", "mbcs", "oem", "palmos", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@lru_cache(1)
def _foreign_files() -> list[tuple[bytes, int, str, str]]:
    """How files begin that hold no text, the byte where that is, their name, and what to do with them."""
    with open(Path(__file__).with_name("foreign_files.csv"), encoding="utf-8", newline="") as stream:
        _header, *rows = csv.reader(stream)
    begins = [begin.encode().decode("unicode_escape").encode("latin-1") for begin, *_ in rows]
    return [(begin, int(place), name, advice) for begin, (_, place, name, advice) in zip(begins, rows, strict=True)]


def find_compression(head: bytes) -> str | None:
    """Return how a file is compressed, by its first bytes."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def check_kind(head: bytes) -> None:
    """Raise ValueError, naming it, for a file that holds no text."""
    for magic, place, name, advice in _foreign_files():
        if head[place : place + len(magic)].lower() == magic.lower():
            raise ValueError(f"this is {name}; {advice}")


def read_chunks(stream: BinaryIO, compression: str | None, size: int) -> Iterator[bytes]:
    """Yield decompressed bytes; a damaged file gives what can be had and then a RecordError."""
    read = _open_compressed(stream, compression)
    try:
        while data := read(size):
            yield data
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the disk or the network
            raise
        message = f"the {compression} file is damaged from here on ({error}); fetch it again"
        raise RecordError(f"damaged_{compression}", message) from error


def _open_compressed(stream: BinaryIO, compression: str | None) -> Callable[[int], bytes]:
    if compression == "zstd":
        import pyarrow  # Python's own comes with 3.14

        return pyarrow.CompressedInputStream(stream, "zstd").read
    openers = {"gzip": lambda packed: gzip.GzipFile(fileobj=packed), "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
    return openers[compression](stream).read1 if compression else stream.read


# --- Encodings


def check_encoding(encoding: str) -> None:
    """Raise ValueError unless Python has an encoding of this name in which files are written."""
    try:
        "".encode(encoding)
        is_of_files = codecs.lookup(encoding).name not in NOT_OF_FILES
    except (LookupError, ValueError):  # ValueError: a NUL in the name, or the encoding "undefined"
        is_of_files = False
    if not is_of_files:
        raise ValueError(f"--encoding {encoding}: no encoding of files; use utf-8, gb18030, big5, utf-16 or the like")


def choose_codec(head: bytes, encoding: str) -> str:
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
    if num_common(best) <= 0 and re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        raise ValueError(f"this is no text: it begins with the bytes {head[:8].hex(' ')}; give JSON, CSV or Parquet")
    return best if num_common(best) > 0 else "cp1252"


def _escape_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Like surrogateescape, which raises where a stray byte is ASCII, as happens in GB18030 and UTF-16."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("sft_escape", _escape_undecodable)


def decode_chunks(chunks: Iterator[bytes], encoding: str) -> Iterator[str]:
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


# A comma after a record is forgiven outside an array, and a missing one inside; files are glued together BOM and all.
SEPARATORS = re.compile(r"[ \t\r\n,\ufeff]*")


class TextWindow:
    """A window on decoded text: `buffer[start:]` is unread, `start` is on line `line` of the file.

    `has_bad_bytes`: the buffer has bytes that were not decoded.
    """

    def __init__(self, chunks: Iterator[str], line: int = 1):
        self.chunks = chunks
        self.buffer = ""
        self.start = 0
        self.line = line
        self.ended = False
        self.fault = None
        self.last_line = 0
        self.num_on_line = 0
        self.has_bad_bytes = False

    def grow(self) -> bool:
        """Read on, at least as much as is unread: trying again stays linear. False, and no change, at the end."""
        parts = [self.buffer[self.start :]]
        num_new = 0
        wanted = max(1, len(parts[0]))
        while num_new < wanted and not self.ended:
            try:
                parts.append(next(self.chunks))
                num_new += len(parts[-1])
            except StopIteration:
                self.ended = True
            except RecordError as error:
                self.ended = True
                self.fault = error
        if num_new:
            self.buffer = "".join(parts)
            self.start = 0
            self.has_bad_bytes = has_lone_surrogate(self.buffer)
        return num_new > 0

    def skip(self) -> str:
        """Skip separators between records; return the next character, or "" at the end."""
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


# --- Ranges of a file, to be read by several processes


class Range(NamedTuple):
    """Bytes `start` to `end` of a JSON file in UTF-8: whole lines from `line` to before `end_line`.

    A guess at whole records: `in_array` says whether the range before it is thought to end inside an array, and
    `ends_in_array` the same of this one. The last range of a file has no `end_line`.
    """

    path: str
    start: int
    end: int
    line: int
    end_line: int | None
    in_array: bool
    ends_in_array: bool

    def read(self, stream: BinaryIO) -> Iterator[bytes]:
        """Yield the range's bytes, and then what follows, of which a reader takes as much as its last record needs."""
        stream.seek(self.start)
        yield stream.read(self.end - self.start)
        while data := stream.read(OVERHANG_BYTES):
            yield data


def cut_file(path: str, encoding: str) -> Iterator[Range]:
    """Cut a file of JSON records that begin on lines of their own; nothing for any other, which is read as a stream.

    The last range reaches to the end of the file, also if no record begins on a line for MAX_RANGE_BYTES.
    """
    with open(path, "rb") as stream:
        head = stream.read(PROBE_BYTES)
        opening = _find_opening(head, encoding)
        if not opening:
            return
        start = 0
        line = 1
        size = os.fstat(stream.fileno()).st_size
        is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        while start < size:
            end, num_lines = _find_end(stream, start, opening)
            end_line = line + num_lines if end < size else None
            yield Range(path, start, end, line, end_line, is_array and start > 0, is_array and end < size)
            start = end
            line = line + num_lines


def _find_opening(head: bytes, encoding: str) -> bytes | None:
    """Return how the lines begin that open a record, by the first record; None for what is no JSON in UTF-8."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    try:
        if text[:1] not in (b"{", b"[") or choose_codec(head, encoding) != "utf-8":
            return None
    except ValueError:
        return None
    before = text[: max(0, text.find(b"{"))]
    indent = before[before.rfind(b"\n") + 1 :]
    return b"\n" + (b"" if indent.strip() else indent) + b"{"


def _find_end(stream: BinaryIO, start: int, opening: bytes) -> tuple[int, int]:
    """Return where a line begins with `opening`, RANGE_BYTES after `start` or later, and the lines up to there.

    Without one in MAX_RANGE_BYTES it is the end of the file.
    """
    stream.seek(start)
    data = stream.read(RANGE_BYTES)
    rest = b""
    end = start + len(data)
    num_lines = data.count(b"\n")
    while end - start < MAX_RANGE_BYTES and (data := stream.read(SEARCH_BYTES)):
        rest += data
        if (found := rest.find(opening)) >= 0:
            return end + found + 1, num_lines + rest.count(b"\n", 0, found + 1)
        counted = max(0, len(rest) - len(opening) + 1)
        end = end + counted
        num_lines = num_lines + rest.count(b"\n", 0, counted)
        rest = rest[counted:]
    return os.fstat(stream.fileno()).st_size, num_lines


# --- Parsing a value


# NaN is what pandas writes where a concatenated table has no value.
record_decoder = json.JSONDecoder(
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
        return record_decoder.decode(raw)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        raise malformed_json(error.msg, error.pos) from error
    except RecursionError as error:
        raise RecordError("too_deep", "the record is nested too deeply to be a conversation") from error
    except ValueError as error:
        raise RecordError("huge_number", f"a number has too many digits; write it as a string ({error})") from error


def malformed_json(message: str, position: int) -> RecordError:
    # Some of json's messages end in "at" already.
    where = f"{message.removesuffix(' at')} at character {position + 1} of the record"
    return RecordError("malformed_json", f"{where}; this is not valid JSON")
