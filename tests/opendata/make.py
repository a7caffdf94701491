"""Records and files that tests of sft.opendata read, and what comes out of them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft.opendata.build import build_opendata
from sft.opendata.conversation import read_record
from sft.opendata.fields import RecordError
from sft.opendata.records import split_file
from tests.conftest import ROOT


def record(number, **more):
    return {"instruction": f"question {number}", "input": "", "output": f"answer {number}."} | more


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_file(path, **options):
    """The records of a file, each with its value or its error."""
    for raw in split_file(path, parse=True, **options):
        try:
            yield raw._replace(record=raw.parse())
        except RecordError as error:
            yield raw._replace(error=error)


def build(inputs, output, **options):
    options = {"workers": 1, "eval_share": 0.0, "max_rejected": 1.0} | options
    return build_opendata([inputs] if isinstance(inputs, str) else inputs, output=str(output), **options)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def texts(output, name="train.json"):
    return [[message["content"] for message in row["messages"]] for row in read_lines(Path(output) / name)]


def digests(output):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(output).iterdir())}


def digests_of_files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def run(*arguments, **options):
    command = [sys.executable, "-m", "sft.opendata", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def pair(number):
    return f'{{"instruction": "q{number}", "output": "a{number}"}}'


def write_file(folder, content, name="data.json"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder, content, **options):
    """Questions of the good records and reasons of the others, each with its place."""
    return [
        (raw.place, raw.error.reason if raw.error else raw.record.get("instruction", raw.record))
        for raw in read_file(write_file(folder, content), **options)
    ]


def messages_of(record, **options):
    conversation = read_record(record, source="f.json", line=3, **options)
    return [(message["role"], message["content"]) for message in conversation["messages"]]


def reason_of(function, *arguments, **options):
    with pytest.raises(RecordError) as caught:
        function(*arguments, **options)
    return caught.value.reason, str(caught.value)


ONE_TURN = [("user", "q"), ("assistant", "a")]
