"""Every conversation is kept or counted, with its file and line."""

import copy
import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sft.dataset import dataset
from sft.dataset.dataset import Examples, TrainingRows, file_hashes, prepare
from sft.dataset.ledger import check_losses, ledger_lines
from sft.dataset.tokenise import BATCH_SIZE, batches
from sft.files import this_process
from sft.format.render import Renderer
from sft.format.tokens import IGNORE_INDEX, empty_row
from sft.opendata.fields import RecordError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a cache of its own: the default one lies in the working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / ".cache"


@pytest.fixture
def renderer(tokenizer_of) -> Renderer:
    return Renderer(tokenizer_of("qwen2"), "chatml")


def write_lines(path, records):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" if isinstance(r, dict) else r + "\n" for r in records)
    )
    return str(path)


def record(question: str, answer: str) -> dict:
    return {"instruction": question, "input": "", "output": answer}


def test_raw_and_canonical_files_give_the_same_examples(tmp_path, renderer):
    raw = write_lines(tmp_path / "raw.json", [record("你好", "你好！"), record("2+2?", "4")])
    messages = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (("你好", "你好！"), ("2+2?", "4"))
    ]
    canonical = write_lines(
        tmp_path / "canonical.json", [{"id": str(i), "source": "s", "messages": m} for i, m in enumerate(messages)]
    )
    first, _ = prepare([raw], renderer, max_length=64)
    second, _ = prepare([canonical], renderer, max_length=64)
    assert len(first) == len(second) == 2
    for index in range(2):
        expected = renderer.render(messages[index])
        for examples in (first, second):
            assert examples[index]["input_ids"].tolist() == expected.input_ids.tolist()
            assert examples[index]["labels"].tolist() == expected.labels.tolist()


def test_the_ledger_counts_every_record_with_its_first_place(tmp_path, renderer):
    prompt_length = len(renderer.prompt([{"role": "user", "content": "long " * 40}]))
    file = write_lines(
        tmp_path / "a.json",
        [
            record("你好", "你好！"),
            '{"instruction": "broken',
            record("long " * 40, "never seen"),
            record("cut", "word " * 100),
            {"messages": [{"role": "narrator", "content": "x"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        ],
    )
    examples, ledger = prepare([file], renderer, max_length=prompt_length)
    assert ledger["total"] == {
        "in": 6,
        "kept": 2,
        "rejected": 3,
        "prompt_too_long": 1,
        "cut": 1,
    }
    assert len(examples) == 2
    assert ledger["first"]["prompt_too_long"] == f"{file} line 3"
    assert ledger["first"]["rejected"].startswith(f"{file} line 2: ")
    assert ledger_lines(ledger)[0] == "6 conversations in 1 files, 2 kept"
    assert ledger["rejected"] == {"malformed_json": 1, "unknown_role": 1, "nothing_learned": 1}
    reasons = "malformed_json 1, nothing_learned 1, unknown_role 1"
    assert ledger_lines(ledger)[2].startswith(f"  lost, not a conversation: 3 ({reasons}; first: {file} line 2: ")


def test_a_run_stops_when_more_than_the_stated_share_is_lost(tmp_path, renderer):
    file = write_lines(tmp_path / "a.json", [record("q", "a")] * 9 + ["{"])
    _, ledger = prepare([file], renderer, max_length=64)
    check_losses(ledger, max_lost=0.1)
    with pytest.raises(ValueError, match=r"1 of 10 conversations would be lost, more than --max_lost 0\.09"):
        check_losses(ledger, max_lost=0.09)


def test_an_empty_data_set_is_refused_at_any_allowed_loss(tmp_path, renderer):
    file = write_lines(tmp_path / "a.json", ["{"])
    _, ledger = prepare([file], renderer, max_length=64)
    with pytest.raises(ValueError, match="no conversation to train on"):
        check_losses(ledger, max_lost=1.0)


def test_more_conversations_than_a_batch_keep_their_order(tmp_path, renderer):
    count = BATCH_SIZE + 7
    file = write_lines(tmp_path / "a.json", [record(f"q{i}", f"a{i}") for i in range(count)])
    examples, ledger = prepare([file], renderer, max_length=64)
    assert len(examples) == ledger["total"]["kept"] == count
    for index in (0, BATCH_SIZE - 1, BATCH_SIZE, count - 1):
        assert f"a{index}<|im_end|>" in renderer.tokenizer.decode(examples[index]["input_ids"])


def test_examples_slice_the_flat_arrays_and_end_at_the_last():
    in_loss = np.array([False, True, False, True, True])
    examples = Examples(np.arange(5, dtype=np.int32), in_loss, np.array([0, 2, 5]))
    assert examples[1]["input_ids"].tolist() == [2, 3, 4]
    assert examples[1]["labels"].tolist() == [IGNORE_INDEX, 3, 4]
    assert examples.lengths.tolist() == [2, 3]
    assert examples.num_trained_tokens == 3
    with pytest.raises(IndexError):
        examples[2]


def test_batches_cut_a_stream_without_losing_its_end():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hashes([str(tmp_path / "a")]) == {str(tmp_path / "a"): expected}


def test_the_same_content_is_tokenised_once(tmp_path, renderer, cache):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    said = []
    first, ledger = prepare([file], renderer, max_length=64, say=said.append)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    written = (folder / "input_ids").stat().st_mtime_ns
    second, again = prepare([file], renderer, max_length=64, say=said.append)
    assert (folder / "input_ids").stat().st_mtime_ns == written
    assert len(said) == 1
    assert ledger == again
    assert first[0]["input_ids"].tolist() == second[0]["input_ids"].tolist()


@pytest.fixture
def preparer(cache):
    """A process that holds the lock of the one data set in preparation; ends when its input is closed."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sft.files import hold_lock\n"
        "with hold_lock(Path(sys.argv[1]), on_wait=print):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )

    def start(lock: Path) -> subprocess.Popen:
        command, pipes = [sys.executable, "-c", code, str(lock)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        assert process.stdout.readline() == "held\n"
        return process

    return start


def test_data_that_another_process_prepares_is_awaited_and_not_made_again(tmp_path, renderer, cache, preparer):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    prepare([file], renderer, max_length=64)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    folder.rename(tmp_path / "made")
    (cache / f".{folder.name}.dead.partial").mkdir()
    other, said = preparer(folder.with_suffix(".lock")), []

    def finish(text):
        said.append(text)
        (tmp_path / "made").rename(folder)
        other.stdin.close()

    examples, _ledger = prepare([file], renderer, max_length=64, say=finish)
    assert len(examples) == 1
    assert said == [f"waiting for process {other.pid} on {socket.gethostname()}, which tokenises the same data"]
    other.wait()


def test_the_reason_why_another_process_failed_is_raised_by_all_that_waited(tmp_path, renderer, cache, preparer):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    prepare([file], renderer, max_length=64)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    folder.rename(tmp_path / "away")
    other = preparer(folder.with_suffix(".lock"))

    def fail(_text):
        folder.with_suffix(".failed").write_text("a.json line 7: broken")
        other.stdin.close()

    with pytest.raises(ValueError, match=r"a\.json line 7: broken"):
        prepare([file], renderer, max_length=64, say=fail)
    other.wait()
    examples, _ledger = prepare([file], renderer, max_length=64)
    assert len(examples) == 1, "the next run tries again"
    assert [path for path in cache.iterdir() if not path.is_dir()] == []


def test_a_failure_is_written_down_and_what_a_killed_process_left_is_removed(tmp_path, renderer, cache, monkeypatch):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])

    def break_off(*_arguments, **_settings):
        raise ValueError("a.json line 7: broken")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="line 7"):
        patched.setattr(dataset, "_write", break_off)
        prepare([file], renderer, max_length=64)
    (failure,) = cache.iterdir()
    assert failure.read_text() == "a.json line 7: broken"
    (cache / f".{failure.stem}.dead.partial").mkdir()
    prepare([file], renderer, max_length=64)
    assert [path.name for path in cache.iterdir()] == [failure.stem]


def test_a_full_disk_is_named_with_the_flag_for_another(tmp_path, renderer, cache, monkeypatch):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])

    def find_disk_full(*_arguments, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("_write", "write_text", "hold_lock"):
        monkeypatch.setattr(dataset, name, find_disk_full)
        with pytest.raises(
            ValueError, match=r"^--cache_dir \.cache: No space left on device; free space there, or name"
        ):
            prepare([file], renderer, max_length=64)
    assert [path for path in cache.iterdir() if path.suffix != ".failed"] == []


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path, renderer, cache, monkeypatch):
    """Else the cache of its first content would hold the later one."""
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    write = dataset._write

    def write_late(*arguments, **settings):
        write_lines(tmp_path / "a.json", [record("q", "a"), record("q", "b")])
        write(*arguments, **settings)

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"a\.json: was changed while it was read"):
        patched.setattr(dataset, "_write", write_late)
        prepare([file], renderer, max_length=64)
    assert len(prepare([file], renderer, max_length=64)[0]) == 2


def test_a_process_whose_lock_another_took_over_waits_for_that_one(tmp_path, renderer, cache, monkeypatch):
    """It was frozen, and its files are gone when it continues."""
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    prepare([file], renderer, max_length=64)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    folder.rename(tmp_path / "made")
    lock = folder.with_suffix(".lock")

    def lose_lock(*_arguments, **_settings):
        lock.write_text(json.dumps({**this_process(), "host": "node2", "pid": 7}))
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "starts.npy")

    said = []

    def finish(text):
        said.append(text)
        if text.startswith("waiting"):
            (tmp_path / "made").rename(folder)
            lock.unlink()

    monkeypatch.setattr(dataset, "_write", lose_lock)
    assert len(prepare([file], renderer, max_length=64, say=finish)[0]) == 1
    assert said[1:] == ["waiting for process 7 on node2, which tokenises the same data"]


def test_a_change_of_the_same_size_and_time_is_seen(tmp_path, renderer):
    file = write_lines(tmp_path / "a.json", [record("q", "aaaa")])
    times = os.stat(file)
    prepare([file], renderer, max_length=64)
    write_lines(tmp_path / "a.json", [record("q", "bbbb")])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    examples, _ = prepare([file], renderer, max_length=64)
    assert "bbbb" in renderer.tokenizer.decode(examples[0]["input_ids"])


def test_the_length_the_format_and_the_tokenizer_are_part_of_the_key(tmp_path, renderer, tokenizer_of, cache):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    others = [Renderer(tokenizer_of("qwen2"), "blossom"), Renderer(tokenizer_of("bloom"), "chatml")]
    for other, length in ((renderer, 64), (renderer, 65), (others[0], 64), (others[1], 64), (renderer, 64)):
        prepare([file], other, max_length=length)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4


def test_a_bulk_encoder_that_is_found_wrong_is_left_out_and_said(tmp_path, renderer, monkeypatch):
    file = write_lines(tmp_path / "a.json", [record(f"q{i}", f"a{i}") for i in range(200)])
    expected = renderer.render([{"role": "user", "content": "q199"}, {"role": "assistant", "content": "a199"}])

    def pretend(sample=(), num_bytes=0):
        renderer.encoder, renderer._encode = (
            "a liar",
            lambda texts: (
                np.ones(len(texts), dtype=np.int32),
                np.ones(len(texts), dtype=np.int64),
            ),
        )
        return "a liar"

    monkeypatch.setattr(renderer, "use_bulk_encoder", pretend)
    said = []
    examples, _ = prepare([file], renderer, max_length=64, say=said.append)
    assert said == [
        "tokenising 1 files with a liar",
        f"a liar is wrong at {file} line 200; starting again without it",
    ]
    assert examples[199]["input_ids"].tolist() == expected.input_ids.tolist()


def plain_row(renderer: Renderer, messages: list[dict], max_length: int):
    try:
        return renderer.render(messages, max_length=max_length)
    except RecordError as error:
        return empty_row(error.reason, str(error))


def test_the_bulk_way_gives_the_rows_of_the_plain_way(family, tokenizer_of):
    messages = [
        [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts, strict=False)]
        for texts in (
            ("你好", "你好！"),
            ("a", "b" * 500),
            ("q" * 500, "a"),
            ("你", "好", "a", "b" * 300),
            ("Hi", "😀"),
        )
    ]
    messages.append([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}])
    renderer = Renderer(tokenizer_of(family), "blossom")
    renderer.use_bulk_encoder(messages)
    rows = renderer.render_rows(messages, max_length=150)
    plain = [plain_row(renderer, each, 150) for each in messages]
    assert rows.outcomes == [each.outcome for each in plain]
    assert rows.lengths.tolist() == [len(each.input_ids) for each in plain if len(each.input_ids)]
    assert rows.input_ids.tolist() == [token for each in plain for token in each.input_ids.tolist()]
    assert rows.labels.tolist() == [token for each in plain for token in each.labels.tolist()]


def test_the_bulk_way_cuts_where_the_plain_way_cuts(family, tokenizer_of):
    texts = (
        "汉字\U00020000\U00020001",
        "e\u0301e\u0302 x\u0301",
        "\U0001f468\u200d\U0001f469\u2764\ufe0f",
        "a \ufffd b\ufffd",
        "plain",
    )
    messages = [
        [{"role": role, "content": text * 2} for role, text in zip(("user", "assistant") * 2, order, strict=False)]
        for order in [("q", text) for text in texts] + [texts[:4], texts[1:5], ("", texts[0], texts[2], "x")]
    ]
    messages.append([{"role": "system", "content": "Be brief."}, *messages[0]])
    messages.append([*messages[0], messages[0][0], {"role": "assistant", "content": "y", "train": False}])
    messages.append([messages[0][0], {"role": "assistant", "content": "y", "train": False}, *messages[1]])
    renderer = Renderer(tokenizer_of(family), "chatml" if family in ("qwen2", "bloom") else "blossom")
    renderer.use_bulk_encoder()
    shortest, longest = len(renderer.prompt(messages[0][:1])), max(len(renderer.render(m).input_ids) for m in messages)
    for max_length in range(shortest - 1, longest + 1):
        rows = renderer.render_rows(messages, max_length=max_length)
        plain = [plain_row(renderer, each, max_length) for each in messages]
        assert rows.outcomes == [each.outcome for each in plain], max_length
        assert rows.input_ids.tolist() == [token for each in plain for token in each.input_ids.tolist()], max_length
        assert rows.labels.tolist() == [token for each in plain for token in each.labels.tolist()], max_length


def test_little_data_does_not_wait_for_the_fastest_encoder_to_be_made(tokenizer_of):
    assert Renderer(tokenizer_of("qwen2"), "blossom").use_bulk_encoder(num_bytes=1000) == "tokenizers"


def test_byte_level_families_take_the_fast_encoder_and_the_others_the_safe_one(tokenizer_of):
    chosen = {
        family: Renderer(tokenizer_of(family), "blossom").use_bulk_encoder() for family in ("qwen2", "falcon", "yi")
    }
    assert chosen == {"qwen2": "gigatoken", "falcon": "tokenizers", "yi": "tokenizers, with offsets"}


def test_packed_rows_hold_every_example_once_and_none_predicts_its_neighbour():
    in_loss = np.array([True, True, False, True, True, True])
    examples = Examples(np.arange(10, 16, dtype=np.int32), in_loss, np.array([0, 2, 4, 6]))
    rows = TrainingRows(examples, 4, seed=0)
    assert len(rows) == 2
    assert rows.fill == 6 / 8
    seen = sorted(token for row in range(2) for token in rows[row]["input_ids"].tolist())
    assert seen == [10, 11, 12, 13, 14, 15]
    for row in range(2):
        positions, labels = rows[row]["position_ids"].tolist(), rows[row]["labels"].tolist()
        assert positions == [0, 1] * (len(positions) // 2)
        assert [label for label, position in zip(labels, positions, strict=True) if position == 0 and label >= 0] == []
    first = [rows[row]["input_ids"].tolist() for row in range(2)]
    changed = []
    for epoch in range(1, 9):
        rows.pack_for(epoch)
        changed.append([rows[row]["input_ids"].tolist() for row in range(2)] != first)
    assert any(changed)
    rows.pack_for(0)
    assert [rows[row]["input_ids"].tolist() for row in range(2)] == first


def test_pages_of_mapped_rows_are_released_after_reading(tmp_path):
    """30,000 examples of 500 tokens, 75 MB of files; each smaps entry names its file, then says what is resident."""
    number, size = 30_000, 500
    for name, kind in (("input_ids", "<i4"), ("in_loss", "?")):
        np.ones(number * size, kind).tofile(tmp_path / name)
    mapped = [np.memmap(tmp_path / name, kind, "r") for name, kind in (("input_ids", "<i4"), ("in_loss", "?"))]
    examples = Examples(*mapped, np.arange(number + 1) * size)
    assert (examples.num_trained_tokens, examples.largest_id) == (number * size, 1)
    total = sum(int(examples[index]["labels"].sum()) for index in range(number))
    assert total == number * size
    entries = re.findall(rf"{re.escape(str(tmp_path))}/.*?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.S)
    assert len(entries) == 2
    assert sum(map(int, entries)) < 8 * 1024


def test_definitions_of_tools_that_a_template_does_not_write_are_counted(tmp_path, tokenizer_of):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = copy.deepcopy(tokenizer_of("qwen2"))
    tokenizer.chat_template = template
    definition = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with_tools = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]}
    path = write_lines(tmp_path / "data.jsonl", [record("q", "a"), {**with_tools, "tools": [definition]}])
    _examples, ledger = prepare([path], Renderer(tokenizer, "base"), max_length=256, say=lambda text: None)
    assert ledger["total"]["kept"] == 2
    assert ledger_lines(ledger)[-1] == "  notes: tools_not_written_by_the_template 1"
