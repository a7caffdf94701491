"""Raw records: every layout, every broken file, and the rule that one bad record never costs another."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from sft.opendata import decoding, files
from sft.opendata import records as module
from sft.opendata.conversation import read_conversations
from sft.opendata.decoding import parse_record
from sft.opendata.fields import RecordError
from sft.opendata.files import Batch, Work, cut_pieces, map_pieces
from sft.opendata.records import WrongCut, split_file
from sft.workers import Workers
from tests.opendata.make import ONE_TURN, messages_of, pair, read, read_file, reason_of, write_file

ALL = [("1", "q1"), ("2", "q2")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{pair(1)}\n{pair(2)}\n", ALL),
        (f"{pair(1)}\n{pair(2)}", ALL),
        (f"{pair(1)}\r\n{pair(2)}\r\n", ALL),
        (f"\ufeff{pair(1)}\n{pair(2)}\n", ALL),
        (f"\n\n{pair(1)}\n\n{pair(2)}\n", [("3", "q1"), ("5", "q2")]),
        (f"[{pair(1)},\n{pair(2)}]", ALL),
        (f"\ufeff[{pair(1)},{pair(2)}]", [("1", "q1"), ("1.2", "q2")]),
        (f"[{pair(1)}]\n[{pair(2)}]", ALL),
        (f"{pair(1)},\n{pair(2)},\n", ALL),
        (f"{pair(1)}{pair(2)}", [("1", "q1"), ("1.2", "q2")]),
        (json.dumps(json.loads(pair(1)), indent=2) + "\n" + pair(2), [("1", "q1"), ("5", "q2")]),
        (json.dumps([json.loads(pair(1)), json.loads(pair(2))], indent=1), [("2", "q1"), ("6", "q2")]),
        ("", []),
        ("[]", []),
    ],
)
def test_arrays_lines_and_values_in_a_row_give_the_same_records(tmp_path, content, expected):
    assert read(tmp_path, content) == expected
    assert read(tmp_path, gzip.compress(content.encode())) == expected


def compress_zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, compress_zstd])
def test_every_compression_gives_the_records_of_the_plain_file(tmp_path, compress):
    content = f"{pair(1)}\n{pair(2)}\n".encode()
    assert read(tmp_path, compress(content)) == ALL


def test_an_archive_is_named_for_what_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.json", "w") as archive:
        archive.writestr("train.json", pair(1))
    with pytest.raises(ValueError, match=r"data.json: this is a ZIP archive .*; unpack it"):
        list(read_file(str(tmp_path / "data.json")))


def test_splitting_does_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    numbers = ["12345678901234567890", "-1.5e10", "true", "null", '"\\u4f60\\n"']
    content = f"[{pair(1)}, {', '.join(numbers)}, {pair(2)}]"
    expected = [raw.raw for raw in read_file(write_file(tmp_path, content))]
    assert expected == [pair(1), *numbers, pair(2)]
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(decoding, "CHUNK_BYTES", size)
        assert [raw.raw for raw in read_file(write_file(tmp_path, content))] == expected


TEXTS = [
    "  lead",
    "007",
    "2024-01-01",
    "a\x00b",
    "a\u2028b\u2029c\x85d",
    "👩‍👩‍👧",
    "tab\tcr\r",
    "\ufeffx",
    "e\u0301",
    "1e400",
]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_no_text_is_changed(tmp_path, form):
    records = [{"instruction": text, "output": text} for text in TEXTS]
    for ascii_only in (True, False):
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
        content = "\n".join(lines) if form == "lines" else "[" + ",\n".join(lines) + "]"
        read_back = [messages_of(raw.record) for raw in read_file(write_file(tmp_path, content))]
        assert read_back == [[("user", text), ("assistant", text)] for text in TEXTS]


BROKEN = '{"instruction": "b" "output": "x"}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{pair(1)}\n{BROKEN}\n{pair(2)}\n", [("1", "q1"), ("2", "malformed_json"), ("3", "q2")]),
        (f"{BROKEN}\n{pair(2)}\n", [("1", "malformed_json"), ("2", "q2")]),
        (f"{pair(1)}\nno json\n{pair(2)}", [("1", "q1"), ("2", "malformed_json"), ("3", "q2")]),
        (f'{pair(1)}\n{{"instruction": "b",\n{pair(2)}', [("1", "q1"), ("2", "malformed_json"), ("3", "q2")]),
        (f'{{"messages": [{{"role": "user"\n{pair(1)}\n{pair(2)}', [("1", "malformed_json"), ("2", "q1"), ("3", "q2")]),
        (f'{pair(1)}\n{{"instruction": "b", "out', [("1", "q1"), ("2", "truncated")]),
        (f"{pair(1)}\nno json", [("1", "q1"), ("2", "malformed_json")]),
        (f"{pair(1)}\n" + "\0" * 99, [("1", "q1"), ("2", "malformed_json")]),
        ("\0" * 99, [("1", "malformed_json")]),
        (f"[{pair(1)}, {BROKEN}, {pair(2)}]", [("1", "q1"), ("1.2", "malformed_json"), ("1.3", "q2")]),
        (f"[{BROKEN}, {BROKEN}, {pair(2)}]", [("1", "malformed_json"), ("1.2", "malformed_json"), ("1.3", "q2")]),
        (f"[{pair(1)}, {BROKEN}]", [("1", "q1"), ("1.2", "malformed_json")]),
        (f'[{{"messages": [1, {pair(1)}, {pair(2)}]', [("1", "truncated"), ("1.2", "q1"), ("1.3", "q2")]),
        (
            '[{"messages": [{"role": "user", "content": "x"}, {"role": "user" "content": "x"}]}, ' + pair(2) + "]",
            [("1", "malformed_json"), ("1.2", "q2")],
        ),
        (f'[{pair(1)}, {{"instruction": "b", "out', [("1", "q1"), ("1.2", "truncated")]),
        (f"[{pair(1)},\n{pair(2)}\n", [("1", "q1"), ("2", "q2"), ("3", "truncated")]),
        (f"{{\n  {BROKEN[1:-1]}\n}}\n{pair(2)}", [("1", "malformed_json"), ("4", "q2")]),
    ],
)
def test_a_broken_record_costs_no_other(tmp_path, content, expected):
    assert read(tmp_path, content) == expected


def test_the_raw_text_of_a_broken_record_is_kept_as_it_was(tmp_path):
    raws = list(read_file(write_file(tmp_path, f"[{pair(1)},\n {BROKEN} ,\n{pair(2)}]")))
    assert [(raw.line, raw.raw) for raw in raws] == [(1, pair(1)), (2, BROKEN), (3, pair(2))]
    assert str(raws[1].error) == "Expecting ',' delimiter at character 21 of the record; this is not valid JSON"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"instruction": "q", "output": "a", "output": "b"}', "duplicate_key"),
        ('{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key"),
        ('{"instruction": ' + "9" * 5000 + "}", "huge_number"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "too_deep"),
        ('{"a":' * 100_000, "too_deep"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep"),
        ('{"a": [1, ' * 100_000, "too_deep"),
    ],
)
@pytest.mark.parametrize("form", ["{}\n{}", "[{},\n{}]"])
def test_hostile_records_are_rejected_and_the_next_one_is_read(tmp_path, content, reason, form):
    assert [found for _, found in read(tmp_path, form.format(content, pair(2)))] == [reason, "q2"]


def test_numbers_out_of_range_and_nan_only_matter_where_text_is_wanted(tmp_path):
    content = '{"instruction": "q", "output": "a", "score": 1e400, "x": -Infinity, "input": NaN}\n'
    content += '{"instruction": "q", "output": 1e400}\n{"instruction": "q", "output": NaN}\nnull\n'
    found = [
        error.reason if error else "kept" for _, error, _, _ in read_conversations([write_file(tmp_path, content)])
    ]
    assert found == ["kept", "not_text", "null_field", "not_object"]


@pytest.mark.parametrize("form", ["{}\n{}", "[{},\n{}]"])
def test_a_record_over_the_limit_is_rejected_in_bounded_memory(tmp_path, monkeypatch, form):
    monkeypatch.setattr(module, "MAX_RECORD_CHARACTERS", 10_000)
    monkeypatch.setattr(module, "MAX_RAW_CHARACTERS", 100)
    monkeypatch.setattr(decoding, "CHUNK_BYTES", 1000)
    for closing in ('", "output": "a"}', ""):
        big = '{"instruction": "' + "x" * 50_000 + closing
        raws = list(read_file(write_file(tmp_path, form.format(big, pair(2)))))
        assert [raw.error.reason if raw.error else raw.record["instruction"] for raw in raws] == ["too_large", "q2"]
        assert raws[0].raw == big[:100]


def test_an_undecodable_byte_rejects_only_its_record_and_keeps_the_byte(tmp_path):
    content = f"{pair(1)}\n".encode() + b'{"instruction": "\xff", "output": "a"}\n' + pair(2).encode()
    raws = list(read_file(write_file(tmp_path, content)))
    assert [raw.error and raw.error.reason for raw in raws] == [None, "encoding", None]
    assert raws[1].raw == '{"instruction": "\udcff", "output": "a"}'
    assert str(raws[1].error) == "byte 0xff at character 18 is not text; fix it or give --encoding"


CHINESE = '{"instruction": "你好，我们在这里说中文", "output": "是的，我不在那里"}'


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named_and_then_read_when_given(tmp_path, encoding):
    text = CHINESE.replace("们", "").replace("这", "那").replace("说", "") if encoding == "big5" else CHINESE
    path = write_file(tmp_path, text.encode(encoding))
    with pytest.raises(ValueError, match=f"^{path}: not UTF-8 text, it looks like {encoding}; read it with --encoding"):
        list(read_file(path))
    assert [raw.record for raw in read_file(path, encoding=encoding)] == [json.loads(text)]


def test_an_encoding_never_turns_utf8_into_mojibake(tmp_path):
    path = write_file(tmp_path, CHINESE)
    assert [raw.record for raw in read_file(path, encoding="gb18030")] == [json.loads(CHINESE)]


def test_a_stray_byte_in_another_encoding_rejects_only_its_record(tmp_path):
    good = CHINESE.encode("gb18030")
    path = write_file(tmp_path, good + b"\n" + b'{"instruction": "\x81", "output": "a"}' + b"\n" + good)
    reasons = [raw.error and raw.error.reason for raw in read_file(path, encoding="gb18030")]
    assert reasons == [None, "encoding", None]


def test_an_unknown_encoding_is_an_error_with_advice(tmp_path):
    for name in ("nope", "hex", "idna", "unicode_escape", "undefined"):
        with pytest.raises(ValueError, match=f"--encoding {name}: no encoding of files; use utf-8, gb18030"):
            list(read_file(write_file(tmp_path, pair(1)), encoding=name))


def test_a_damaged_gzip_file_keeps_the_records_before_the_damage(tmp_path):
    lines = [pair(os.urandom(20).hex()) for _ in range(500)]
    whole = gzip.compress("\n".join(lines).encode())
    for damaged in (whole[: len(whole) // 2], whole[:-4], whole + b"junk"):
        raws = list(read_file(write_file(tmp_path, damaged)))
        assert [raw.raw for raw in raws[:-1]] == lines[: len(raws) - 1]
        assert len(raws) > 200
        assert raws[-1].error.reason == "damaged_gzip"


def test_parquet_rows_are_read_by_the_same_readers(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "n": 1.5, "when": None},
        {"messages": None, "n": None, "when": None},
    ]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (first, _, _, one), (_, error, _, two) = read_conversations([path])
    assert [(message["role"], message["content"]) for message in first["messages"]] == ONE_TURN
    assert (one, two, error.reason) == (1, 2, "unknown_form")


def test_a_date_in_parquet_does_not_become_text(tmp_path):
    path = tmp_path / "data.parquet"
    table = pyarrow.table({"instruction": ["q"], "output": pyarrow.array([0], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, path)
    assert [error.reason for _, error, _, _ in read_conversations([path])] == ["not_text"]


def test_an_unreadable_file_is_an_error_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json: No such file or directory; check the path"):
        list(read_file(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"data\.json: not a readable Parquet file after row 0"):
        list(read_file(write_file(tmp_path, b"PAR1 nothing")))


def test_a_line_break_inside_a_string_is_explained(tmp_path):
    raw, _ = read_file(write_file(tmp_path, '{"instruction": "a\nb"}'))
    assert str(raw.error) == "Invalid control character at character 19 of the record; this is not valid JSON"


def test_parse_record_errors_can_cross_processes():
    import pickle

    error = pickle.loads(pickle.dumps(RecordError("empty", "gone \ud800")))
    assert (error.reason, str(error)) == ("empty", "gone \\ud800")
    assert reason_of(parse_record, "{")[0] == "malformed_json"


def test_a_giant_array_is_read_in_little_memory(tmp_path):
    path = tmp_path / "big.json"
    with open(path, "w") as file:
        file.write("[" + (pair(1) + ",") * 300_000 + pair(2) + "]")
    code = (
        "import sys; from sft.opendata.records import split_file;"
        "n = sum(raw.error is None for raw in split_file(sys.argv[1]));"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"
        "print(n, int(peak) < 40_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.split() == ["300001", "True"], done.stderr


def read_pieces(path):
    """The records of a file, read by pieces in this process; whether a range was wrongly cut."""

    def read_piece(task):
        try:
            return list(task.split())
        except WrongCut:
            return None

    with Workers(1, lambda: read_piece) as started:
        pieces = [Work("data", piece) for piece in cut_pieces(str(path), "utf-8", parse=False)]
        read = list(map_pieces(started, pieces))
    return [raw for _work, raws in read for raw in raws], [task for task, _raws in read] != pieces, len(pieces)


CUT = "\n".join(pair(number) for number in range(30))
OPEN_AT_LINES = '{"messages": [\n{"role": "user", "content": "q"},\n{"role": "assistant", "content": "a"}\n]}\n'


@pytest.mark.parametrize(
    ("content", "is_wrongly_cut"),
    [
        (CUT, False),
        (CUT.replace("\n", "\r\n") + "\r\n\r\n", False),
        ("\ufeff[\n" + CUT.replace("\n", ",\n") + "\n]", False),
        (json.dumps([json.loads(line) for line in CUT.split("\n")], indent=2), False),
        (CUT.replace('"a9"}', '"a9').replace('"q20"', '"\\ud800"') + "\n]\n{", False),
        (CUT + "\n[\n" + CUT.replace("\n", ",\n"), True),
        (CUT + "\n" + OPEN_AT_LINES * 9 + CUT, True),
    ],
    ids=["lines", "crlf", "array", "indented", "broken", "glued", "nested"],
)
def test_a_file_read_in_pieces_gives_the_records_of_the_stream(tmp_path, monkeypatch, content, is_wrongly_cut):
    monkeypatch.setattr(decoding, "RANGE_BYTES", 100)
    monkeypatch.setattr(decoding, "OVERHANG_BYTES", 7)
    path = tmp_path / "data.json"
    path.write_bytes(content.encode())
    found, was_wrongly_cut, num_pieces = read_pieces(path)
    expected = list(split_file(path))
    assert [raw[:3] for raw in found] == [raw[:3] for raw in expected]
    assert [str(raw.error) for raw in found] == [str(raw.error) for raw in expected]
    assert num_pieces > 5
    assert was_wrongly_cut == is_wrongly_cut


def test_files_that_can_not_be_cut_come_as_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LAST_BYTES", 1000)
    texts = {"a.csv": "prompt,completion\nq,a\n", "b.json": "[" + ",".join([pair(1)] * 1000) + "]"}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
        pieces = list(cut_pieces(str(tmp_path / name), "utf-8", parse=False))
        assert {type(piece) for piece in pieces} == {Batch}, name
        records = [raw[:3] for piece in pieces for raw in piece.records]
        assert records == [raw[:3] for raw in split_file(tmp_path / name)]


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "RANGE_BYTES", 100)
    path = tmp_path / "data.json"
    path.write_text(CUT)
    piece = list(cut_pieces(str(path), "utf-8", parse=False))[-2]
    os.truncate(path, piece.end - 50)
    with pytest.raises(ValueError, match="the file became shorter while it was read"):
        list(Work("data", piece).split())
