"""Nothing vanishes: every conversation is kept or counted, with its file and line."""

import json

import numpy as np
import pytest

from sft.chat_format import IGNORE_INDEX, Renderer
from sft.dataset import BATCH_SIZE, Examples, batches, check_losses, file_hashes, find_files, ledger_lines, tokenise


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
    first, _ = tokenise([raw], renderer, max_length=64)
    second, _ = tokenise([canonical], renderer, max_length=64)
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
            {"messages": [{"role": "bot", "content": "x"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        ],
    )
    examples, ledger = tokenise([file], renderer, max_length=prompt_length)
    assert ledger["total"] == {
        "in": 6,
        "kept": 2,
        "rejected": 2,
        "prompt_too_long": 1,
        "cut": 1,
        "no_trained_token": 1,
    }
    assert len(examples) == 2
    assert ledger["first"]["prompt_too_long"] == f"{file} line 3"
    assert ledger["first"]["rejected"].startswith(f"{file} line 2: ")
    assert ledger_lines(ledger)[0] == "6 conversations in 1 files, 2 kept"
    assert f"  lost, no token to train on: 1 (first: {file} line 6)" in ledger_lines(ledger)


def test_a_run_stops_when_more_than_the_stated_share_is_lost(tmp_path, renderer):
    file = write_lines(tmp_path / "a.json", [record("q", "a")] * 9 + ["{"])
    _, ledger = tokenise([file], renderer, max_length=64)
    check_losses(ledger, max_lost=0.1)
    with pytest.raises(ValueError, match=r"1 of 10 conversations would be lost, more than --max_lost 0\.09"):
        check_losses(ledger, max_lost=0.09)


def test_an_empty_data_set_is_refused_whatever_may_be_lost(tmp_path, renderer):
    file = write_lines(tmp_path / "a.json", ["{"])
    _, ledger = tokenise([file], renderer, max_length=64)
    with pytest.raises(ValueError, match="no conversation to train on"):
        check_losses(ledger, max_lost=1.0)


def test_more_conversations_than_a_batch_keep_their_order(tmp_path, renderer):
    count = BATCH_SIZE + 7
    file = write_lines(tmp_path / "a.json", [record(f"q{i}", f"a{i}") for i in range(count)])
    examples, ledger = tokenise([file], renderer, max_length=64)
    assert len(examples) == ledger["total"]["kept"] == count
    for index in (0, BATCH_SIZE - 1, BATCH_SIZE, count - 1):
        assert f"a{index}<|im_end|>" in renderer.tokenizer.decode(examples[index]["input_ids"])


def test_examples_slice_the_flat_arrays_and_end_at_the_last():
    labels = np.array([IGNORE_INDEX, 5, IGNORE_INDEX, 7, 8], dtype=np.int32)
    examples = Examples(np.arange(5, dtype=np.int32), labels, np.array([0, 2, 5]))
    assert examples[1]["input_ids"].tolist() == [2, 3, 4]
    assert examples.lengths.tolist() == [2, 3]
    assert examples.num_trained_tokens == 3
    with pytest.raises(IndexError):
        examples[2]


def test_the_held_out_file_beside_the_training_file_is_never_trained_on(tmp_path):
    for name in ("train.json", "eval.json", "more.json"):
        write_lines(tmp_path / name, [record("q", "a")])
    train, held_out = find_files([str(tmp_path)])
    assert [file.rsplit("/")[-1] for file in train] == ["more.json", "train.json"]
    assert [file.rsplit("/")[-1] for file in held_out] == ["eval.json"]


def test_a_file_on_both_sides_is_refused(tmp_path):
    file = write_lines(tmp_path / "a.json", [record("q", "a")])
    with pytest.raises(ValueError, match="a held-out file must not be trained on"):
        find_files([file], [str(tmp_path)])


def test_batches_cut_a_stream_without_losing_its_end():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hashes([str(tmp_path / "a")]) == {str(tmp_path / "a"): expected}
