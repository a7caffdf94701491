"""Worker processes prepare what one process prepares, byte for byte, and name the record on which they fail."""

import json
import random
import re
from datetime import date

import numpy as np
import pytest

from sft.dataset import dataset
from sft.dataset.dataset import prepare
from sft.dataset.tokenise import make_tokeniser, pack_renderer
from sft.format.render import Renderer
from sft.opendata import decoding
from sft.workers import _WorkerProcesses


@pytest.fixture(autouse=True)
def no_stand_in(monkeypatch):
    """All tasks go to the workers; else, little data is done before they have started."""
    monkeypatch.setattr(_WorkerProcesses, "have_started", lambda processes: True)


def record(number: int, answer: str = "") -> dict:
    return {"instruction": f"question {number} 你好", "input": "", "output": answer or f"answer {number}. " * 3}


def write_lines(path, lines) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def messy_files(folder) -> list[str]:
    """Lines, an array with a line for each record, and records with inner objects that begin on lines."""
    random.seed(0)
    lines = [record(number) for number in range(300)]
    lines[17] = '{"instruction": "broken\n'
    lines[41] = {"messages": [{"role": "narrator", "content": "x"}]}
    lines[90] = record(90, "long " * 300)
    lines[200] = {"id": "1", "source": "other", "messages": [{"role": "user", "content": "q"}, {"role": "x"}]}
    array = "[\n" + ",\n".join(json.dumps(record(number)) for number in range(300, 500)) + "\n]\n"
    turns = '{{"role": "user", "content": "q{}"}},\n{{"role": "assistant", "content": "a"}}'
    wrongly_cut = "".join(f'{{"messages": [\n{turns.format(number)}\n]}}\n' for number in range(90))
    return [
        write_lines(folder / "a.jsonl", lines),
        write_lines(folder / "b.json", [array]),
        write_lines(folder / "c.json", [wrongly_cut]),
    ]


def test_two_workers_give_the_bytes_of_one_process(tmp_path, tokenizer_of, monkeypatch):
    monkeypatch.setattr(decoding, "RANGE_BYTES", 2000)
    files, found = messy_files(tmp_path), []
    for num_workers in (1, 2):
        cache = tmp_path / f"cache{num_workers}"
        renderer = Renderer(tokenizer_of("qwen2"), "chatml")
        _examples, ledger = prepare(files, renderer, max_length=128, cache_dir=str(cache), num_workers=num_workers)
        (folder,) = (path for path in cache.iterdir() if path.is_dir())
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(found[0]) == ["in_loss", "input_ids", "ledger.json", "origins.npy", "starts.npy"]
    assert found[0] == found[1]
    assert ledger["total"] == {"in": 590, "kept": 587, "rejected": 3, "cut": 1}
    assert ledger["first"]["rejected"].startswith(f"{files[0]} line 18: ")
    assert ledger["first"]["cut"] == f"{files[0]} line 91"


def test_a_renderer_of_a_worker_gives_the_same_rows_without_transformers(family, tokenizer_of):
    messages = [[{"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello <|im_end|> 😀"}]]
    for chat_format in ("chatml", "blossom"):
        renderer = Renderer(tokenizer_of(family), chat_format, today=date(2026, 1, 2), train_turns="last")
        renderer.use_bulk_encoder(messages)
        other = pack_renderer(renderer)()
        assert type(other.tokenizer).__name__ == "BareTokenizer"
        assert other.encoder == renderer.encoder
        assert other.describe() | {"chat_format_reason": ""} == renderer.describe() | {"chat_format_reason": ""}
        rows, expected = (each.render_rows(messages * 2, max_length=64) for each in (other, renderer))
        renderer.free_encoder()
        rows_without = renderer.render_rows(messages * 2, max_length=64)
        for place in range(3):
            assert np.array_equal(rows[place], expected[place])
            assert np.array_equal(rows_without[place], expected[place])


def fail_on(word: str, function):
    """Return a function that fails on one word, and else does the same."""

    def fail(texts, *args, **options):
        if word in str(texts):
            raise RuntimeError("index out of range")
        return function(texts, *args, **options)

    return fail


def make_failing(load_renderer, **settings):
    """Like `make_tokeniser`, with a tokenizer that fails on one word."""
    do_task = make_tokeniser(load_renderer, **settings)
    renderer = do_task.keywords["renderer"]
    renderer.render_rows = fail_on("boom", renderer.render_rows)
    renderer.render_conversation = fail_on("boom", renderer.render_conversation)
    return do_task


def make_failing_in_bulk(load_renderer, **settings):
    """Like `make_tokeniser`, with a bulk encoder that fails on one word."""
    do_task = make_tokeniser(load_renderer, **settings)
    renderer = do_task.keywords["renderer"]
    if renderer._encode:
        renderer._encode = fail_on("boom", renderer._encode)
    return do_task


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_record_on_which_the_tokenizer_fails_is_named(tmp_path, tokenizer_of, monkeypatch, num_workers):
    monkeypatch.setattr(decoding, "RANGE_BYTES", 2000)
    monkeypatch.setattr(dataset, "make_tokeniser", make_failing)
    file = write_lines(tmp_path / "a.jsonl", [record(n, "boom" if n == 150 else "") for n in range(300)])
    cache, renderer = tmp_path / "cache", Renderer(tokenizer_of("qwen2"), "chatml")
    with pytest.raises(ValueError, match="fails on this record") as caught:
        prepare([file], renderer, max_length=128, cache_dir=str(cache), num_workers=num_workers)
    assert str(caught.value).startswith(f"{file} line 151: the tokenizer fails on this record (RuntimeError: index out")
    assert [path.suffix for path in cache.iterdir()] == [".failed"]


def test_a_record_at_the_beginning_on_which_the_tokenizer_fails_is_named(tmp_path, tokenizer_of, monkeypatch):
    """The encoder proves itself on the first records; a panic of a Rust library is no Exception."""
    file = write_lines(tmp_path / "a.jsonl", [record(n, "boom" if n == 2 else "") for n in range(20)])
    render_rows = Renderer.render_rows

    def fail(renderer, batch, **options):
        if "boom" in str(batch):
            raise BaseException("index out of range")
        return render_rows(renderer, batch, **options)

    monkeypatch.setattr(Renderer, "render_rows", fail)
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: the tokenizer fails on this record \(BaseException: index"):
        prepare([file], Renderer(tokenizer_of("qwen2"), "chatml"), max_length=128, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_data_on_which_the_bulk_encoder_fails_are_encoded_without_it(tmp_path, tokenizer_of, monkeypatch, num_workers):
    monkeypatch.setattr(decoding, "RANGE_BYTES", 2000)
    monkeypatch.setattr(dataset, "make_tokeniser", make_failing_in_bulk)
    file = write_lines(tmp_path / "a.jsonl", [record(n, "boom" if n == 150 else "") for n in range(300)])
    renderer = Renderer(tokenizer_of("qwen2"), "chatml")
    said = []
    options = {"max_length": 128, "cache_dir": str(tmp_path / "cache"), "say": said.append, "num_workers": num_workers}
    examples, _ledger = prepare([file], renderer, **options)
    assert len(examples) == 300
    assert len(said) == 2
    assert re.fullmatch(rf"tokenizers is wrong at {file} line \d+; starting again without it", said[1])


def test_a_process_that_stands_in_for_workers_gives_the_same_bytes(tmp_path, tokenizer_of, monkeypatch):
    monkeypatch.setattr(_WorkerProcesses, "have_started", lambda processes: next(answers, True))
    answers = iter([False] * 3)
    monkeypatch.setattr(decoding, "RANGE_BYTES", 2000)
    file = write_lines(tmp_path / "a.jsonl", [record(number) for number in range(300)])
    found = []
    for num_workers in (1, 2):
        renderer = Renderer(tokenizer_of("qwen2"), "chatml")
        cache = str(tmp_path / f"cache-{num_workers}")
        examples, _ledger = prepare([file], renderer, max_length=64, cache_dir=cache, num_workers=num_workers)
        found.append([examples[number]["input_ids"].tolist() for number in range(300)])
    assert found[0] == found[1]
    assert next(answers, "all used") == "all used"
    assert renderer._encode is None
