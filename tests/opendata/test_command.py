"""The command: flags, the printed table, mistakes and exit codes."""

import json
import os

from sft.opendata import __main__ as command
from sft.opendata import build as opendata
from sft.opendata.__main__ import main, print_ledger
from tests.opendata.make import build, digests, record, run, texts, write


def test_each_rule_has_a_switch(tmp_path, capsys):
    path = write(tmp_path / "a.json", [record(1, output="one, two,"), record(2)])
    for number, (flags, kept) in enumerate([((), 1), (("--no_drop_cut_off",), 2), (("--drop_cut_off",), 1)]):
        assert main([path, "--output", str(tmp_path / f"out{number}"), "--eval_share", "0", *flags]) == 0
        assert len(texts(tmp_path / f"out{number}")) == kept
    assert capsys.readouterr().out.count("dropped: cut_off 1") == 2


def test_the_table_fits_120_columns_and_adds_up(tmp_path, capsys):
    write(
        tmp_path / "in/一个名字很长很长的文件一个名字很长很长的文件一个名字很长很长的文件.json", [record(1), record(2)]
    )
    write(tmp_path / "in/b.json", [record(1), "broken"])
    print_ledger(build(str(tmp_path / "in"), tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[:2] + lines[3:4]] == [
        "file in train eval dupl. near unsampled dropped rejected p50 p90 p99",
        "b.json 2 1 0 0 0 0 0 1 19 19 19",
        "total 4 2 0 1 0 0 0 1 19 19 19",
    ]
    assert lines[5:] == [
        "rejected: malformed_json 1",
        "first malformed_json: b.json line 2: Expecting value at character 1 of the record; this is not valid JSON",
    ]
    assert max(map(command.display_width, lines)) <= 120


def test_all_mistakes_are_printed_at_once_in_a_line_each_and_no_file_is_written(tmp_path):
    path = write(tmp_path / "a.json", [record(1)])
    gbk = tmp_path / "gbk.json"
    gbk.write_bytes(json.dumps(record(1, output="我们在这里说中文"), ensure_ascii=False).encode("gb18030"))
    (tmp_path / "file").touch()
    done = run(
        *(path, gbk, tmp_path / "missing.json", f"{path}@many", f"{path}@0", f"{path}@5", "--mix", "nothing"),
        *("--output", tmp_path / "file/out", "--workers", 0, "--eval_share", 2, "--near_duplicates", 7),
        *("--max_rejected", 3, "--reasoning", "maybe"),
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{tmp_path}/missing.json: no such file or folder, and as a glob it matches no data file",
        f"{path}@many: 'many' is no sample size; write a number as in @20000, or a share as in @10%",
        f"{path}@0: '0' is no sample size; write a number as in @20000, or a share as in @10%",
        f"{path}@5: {path} is also given with another sample size; give it once",
        "--mix nothing: there are belle, blossom-v5-stage1, blossom-v5-stage2",
        f"{gbk}: not UTF-8 text, it looks like gb18030; read it with --encoding gb18030, or convert it",
        "--eval_share 2.0: give a share from 0 up to, but without, 1",
        "--max_rejected 3.0: give a share from 0 to 1",
        "--near_duplicates 7.0: give a similarity above 0 and up to 1, such as 0.8",
        "--preprocessing_num_workers 0: give at least 1",
        "--reasoning maybe: use auto, keep, drop",
        f"{tmp_path}/file: can't be written to; choose another --output or --report",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "file", "gbk.json"]


def test_no_input_and_a_bad_encoding_are_mistakes(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "no input: name a file, a folder, a glob, a data set or --mix\n"
    path = write(tmp_path / "a.json", [record(1)])
    assert main([path, "--encoding", "nope", "--output", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == "--encoding nope: no encoding of files; use utf-8, gb18030, big5, utf-16 or the like\n"
    )
    assert not (tmp_path / "out").exists()


def test_only_overwrite_replaces_files_and_only_our_own(tmp_path, capsys):
    path, out = write(tmp_path / "a.json", [record(1)]), tmp_path / "out"
    assert main([path, "--output", str(out)]) == 0
    (out / "mine.txt").write_text("keep")
    before = digests(out)
    write(tmp_path / "a.json", [record(2)])
    capsys.readouterr()
    assert main([path, "--output", str(out)]) == 2
    files = ", ".join(str(out / name) for name in ("train.json", "eval.json", "rejects.jsonl", "ledger.json"))
    assert capsys.readouterr().err == f"{files}: already there; use --overwrite to replace, or another --output\n"
    assert digests(out) == before
    assert main([path, "--output", str(out), "--overwrite", "--eval_share", "0"]) == 0
    assert texts(out) == [["question 2", "answer 2."]]
    assert (out / "mine.txt").read_text() == "keep"
    assert sorted(os.listdir(out)) == ["eval.json", "ledger.json", "mine.txt", "rejects.jsonl", "train.json"]


def test_too_much_malformed_input_is_written_and_gives_an_exit_code(tmp_path, capsys):
    path = write(tmp_path / "a.json", [*map(record, range(30)), "broken", record(1, output="")])
    assert main([path, "--output", str(tmp_path / "out"), "--eval_share", "0"]) == 1
    assert len(texts(tmp_path / "out")) == 30
    message = f"1 of 32 records (3.1%) are malformed, more than --max_rejected 0.01; see {tmp_path}/out/rejects.jsonl\n"
    assert capsys.readouterr().err == message
    assert main([path, "--output", str(tmp_path / "out2"), "--max_rejected", "0.05"]) == 0


def test_a_failure_in_the_middle_changes_nothing_and_cleans_up(tmp_path, monkeypatch, capsys):
    path, out = write(tmp_path / "a.json", [record(1)]), tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(opendata._StagedFiles, "_write", full)
    assert main([path, "--output", str(out), "--workers", "1"]) == 1
    assert capsys.readouterr().err == f"{out}: No space left on device; nothing was changed\n"
    assert not out.exists()
