"""Inputs: paths, folders, sample sizes, and data sets of the hub."""

import http.server
import json
import os
import threading

import pytest

from sft.opendata.build import build_opendata
from sft.opendata.files import MIXES, find_skipped, list_files, split_sample
from tests.opendata.make import build, digests, read_lines, record, run, write


def test_list_files_sorts_a_folder_and_leaves_out_what_is_no_data(tmp_path):
    names = [
        "b.json",
        "a/z.jsonl",
        "a/y.json.gz",
        "c.parquet",
        ".hidden.json",
        ".h/x.json",
        "ledger.json",
        "rejects.jsonl",
    ]
    for name in [*names, "notes.txt", "dataset_infos.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / name) for name in ("a/y.json.gz", "a/z.jsonl", "b.json", "c.parquet")]
    assert list_files(tmp_path) == expected
    assert list_files(str(tmp_path / "*")) == sorted([*expected, str(tmp_path / "notes.txt")])
    assert list_files(str(tmp_path / "**/*.jsonl")) == [str(tmp_path / "a/z.jsonl")]
    assert list_files(tmp_path / "notes.txt") == [str(tmp_path / "notes.txt")]


def test_a_pipe_in_a_folder_is_not_waited_for_and_an_empty_output_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").touch()
    assert list_files(tmp_path) == [str(tmp_path / "a.jsonl")]
    assert find_skipped([tmp_path]) == [str(tmp_path / "pipe.jsonl")]
    with pytest.raises(ValueError, match="--output: is empty; name a folder"):
        build_opendata([str(tmp_path)], output="")


@pytest.mark.parametrize("name", ["missing.json", "*.nothing", "empty"])
def test_list_files_says_so_when_nothing_is_there(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        list_files(str(tmp_path / name))


def test_a_path_that_exists_wins_over_a_sample_size(tmp_path):
    path = write(tmp_path / "a@1", [record(1), record(2)])
    assert build(path, tmp_path / "out")["total"]["train"] == 2


def test_a_sample_has_exactly_its_size_and_is_spread_over_all_files_of_its_input(tmp_path):
    for name in "abc":
        write(tmp_path / f"in/{name}.json", [record(f"{name}{number}") for number in range(200)])
    ledger = build(f"{tmp_path}/in@90", tmp_path / "out")
    rows = ledger["files"].values()
    assert (ledger["total"]["train"], ledger["total"]["not_sampled"]) == (90, 510)
    assert all(15 <= row["train"] <= 45 for row in rows)
    places = [row["id"].split(":") for row in read_lines(tmp_path / "out/train.json")]
    assert places == sorted(places, key=lambda place: (place[0], int(place[1])))
    other = build(f"{tmp_path}/in@90", tmp_path / "other", seed=1)
    assert other["total"]["train"] == 90
    assert digests(tmp_path / "other")["train.json"] != digests(tmp_path / "out")["train.json"]
    assert build(f"{tmp_path}/in@10000", tmp_path / "all")["total"]["train"] == 600


def test_a_share_takes_about_that_much_of_a_file_whose_records_are_on_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(number) for number in range(1000)]))
    total = build(f"{path}@10%", tmp_path / "out")["total"]
    assert 70 <= total["train"] <= 130
    assert total["train"] + total["not_sampled"] == 1000


# --- The hub


FILES = {
    "train/a.json": json.dumps([record(number) for number in range(40)]).encode(),
    "b.jsonl": json.dumps(record(99)).encode(),
    "dataset_infos.json": b"{}",
    "README.md": b"hello",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of huggingface.co that a data set's files are read through."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/datasets/me/data/resolve/"):
            body = FILES[path.split("/", 6)[6]]
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self.answer(206, body[int(start) : int(end or len(body)) + 1])
        elif path.startswith("/api/datasets/me/data/tree/"):
            folder = path.split("/", 7)[7] if path.count("/") > 6 else ""
            files = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in FILES.items()]
            self.answer(200, json.dumps([file for file in files if os.path.dirname(file["path"]) == folder]).encode())
        elif path.startswith("/api/datasets/me/data"):
            info = {"id": "me/data", "sha": "c" * 40, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b"{}")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    server.shutdown()


def test_a_data_set_of_the_hub_is_streamed_from_the_endpoint(tmp_path, hub):
    done = run("me/data@30", "--output", tmp_path / "out", "--eval_share", 0, env=hub)
    assert (done.returncode, done.stderr) == (0, "")
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert {name: row["in"] for name, row in ledger["files"].items()} == {
        "me/data/b.jsonl": 1,
        "me/data/train/a.json": 40,
    }
    assert (ledger["total"]["train"], ledger["total"]["not_sampled"]) == (30, 11)
    assert {row["id"].rpartition(":")[0] for row in read_lines(tmp_path / "out/train.json")} >= {"me/data/train/a.json"}


def test_a_data_set_out_of_reach_is_one_line(tmp_path, hub):
    done = run("me/missing", "--output", tmp_path / "out", env=hub)
    assert done.returncode == 2
    assert done.stderr.startswith("me/missing: no such path here, and no data set the hub would give us (")
    assert done.stderr.count("\n") == 1
    done = run("me/data", "--output", tmp_path / "out", env=hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_mixes_are_data_that_the_command_can_read():
    for inputs in MIXES.values():
        for text in inputs:
            name, size = split_sample(text)
            assert name.count("/") == 1
            assert size > 0
