"""Which examples an epoch takes: times per epoch, replay, and a number of rows that stays."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.mixture import Mixture, Part, find_files, mix, mixture_table


def examples_of(lengths: list[int]) -> Examples:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(np.arange(starts[-1], dtype=np.int32), np.ones(starts[-1], bool), starts)


def test_files_seen_once_are_taken_whole_and_in_order():
    mixture = Mixture([Part("a", 0, 3, 1.0), Part("b", 3, 5, 1.0)], seed=7)
    assert mixture.is_plain and not mixture.changes
    assert mixture.take(0).tolist() == mixture.take(4).tolist() == [0, 1, 2, 3, 4]


def test_2x_is_every_example_twice_in_each_epoch():
    mixture = Mixture([Part("a", 0, 3, 1.0), Part("b", 3, 5, 2.0)], seed=7)
    assert not mixture.is_plain and not mixture.changes
    assert Counter(mixture.take(3).tolist()) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}


@pytest.mark.parametrize(("times", "epochs", "seen"), [(0.5, 4, 2), (0.25, 8, 2), (1.5, 2, 3), (0.1, 10, 1)])
def test_a_part_of_a_file_goes_round_until_every_example_was_there_as_often(times, epochs, seen):
    mixture = Mixture([Part("a", 10, 30, times)], seed=7)
    taken = [mixture.take(epoch).tolist() for epoch in range(epochs)]
    assert [len(epoch) for epoch in taken] == [round(times * 20)] * epochs
    assert Counter(number for epoch in taken for number in epoch) == dict.fromkeys(range(10, 30), seen)
    assert taken[0] != taken[1]


def test_the_examples_of_an_epoch_follow_from_seed_and_epoch_alone():
    parts = [Part("a", 0, 40, 0.3), Part("b", 40, 50, 2.5)]
    again = Mixture(parts, seed=7)
    again.take(9)
    assert again.take(5).tolist() == Mixture(parts, seed=7).take(5).tolist() != Mixture(parts, seed=8).take(5).tolist()


def test_a_replay_share_is_of_the_tokens_of_an_epoch():
    lengths = np.array([100] * 9 + [10] * 60)
    mixture = mix({"new": 1.0, "old": None}, {"new": 9, "old": 60}, lengths, replay_share=0.25, seed=7)
    # A quarter is replay: 300 tokens beside 900, thus 30 of the 60 conversations of 10 tokens.
    assert [(part.times, part.num_taken) for part in mixture.parts] == [(1.0, 9), (0.5, 30)]
    assert mixture_table(mixture, lengths) == [
        ["file", "conversations", "times per epoch", "taken per epoch", "tokens per epoch", "share"],
        ["new", "9", "1", "9", "900", "75.0%"],
        ["old (replay)", "60", "0.5", "30", "300", "25.0%"],
    ]


def test_replay_goes_by_what_is_taken_of_the_new_files_and_repeats_a_small_one():
    mixture = mix({"new": 2.0, "old": None}, {"new": 5, "old": 2}, np.full(7, 10), replay_share=0.5, seed=7)
    assert [part.times for part in mixture.parts] == [2.0, 5.0]
    assert Counter(mixture.take(0).tolist()) == {**dict.fromkeys(range(5), 2), 5: 5, 6: 5}


def test_the_number_of_packed_rows_is_the_same_in_every_epoch_and_no_example_is_lost():
    lengths = np.random.default_rng(3).integers(1, 60, 200).tolist()
    mixture = Mixture([Part("a", 0, 120, 0.35), Part("b", 120, 200, 1.0)], seed=7)
    rows = TrainingRows(examples_of(lengths), 64, seed=7, mixture=mixture, epochs=12)
    sizes, unlike = set(), set()
    for epoch in range(12):
        rows.pack_for(epoch)
        sizes.add(len(rows))
        unlike.add(rows.num_tokens)
        assert sorted(rows.rows.examples.tolist()) == sorted(mixture.take(epoch).tolist())
        assert all(len(rows[index]["input_ids"]) <= 64 for index in range(len(rows)))
        assert all(len(rows.rows[index]) for index in range(len(rows)))
    assert len(sizes) == 1
    assert len(unlike) > 6  # the epochs do differ


def test_rows_without_packing_are_the_examples_taken():
    rows = TrainingRows(examples_of([2, 3, 4]), None, seed=7, mixture=Mixture([Part("a", 0, 3, 2.0)], seed=7))
    assert (len(rows), rows.num_examples, rows.num_tokens, rows.fill) == (6, 6, 18, None)
    assert sorted(len(rows[index]["input_ids"]) for index in range(6)) == [2, 2, 3, 3, 4, 4]
    assert set(rows[0]) == {"input_ids", "labels"}


def write(path, number=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"instruction": f"q{number}", "output": "a"}) + "\n", encoding="utf-8")
    return str(path)


def test_times_are_written_after_the_path_of_a_file_a_folder_or_a_glob(tmp_path):
    one, two, old = write(tmp_path / "a/1.json"), write(tmp_path / "b/2.json"), write(tmp_path / "old/train.json")
    held_out, odd = write(tmp_path / "old/eval.json"), write(tmp_path / "a@2x/3.json")
    found, beside = find_files([f"{tmp_path}/a@3x", f"{tmp_path}/b/*.json@0.5x", odd], (), [str(tmp_path / "old")])
    assert found == {one: 3.0, two: 0.5, odd: 1.0, old: None}
    assert beside == [held_out]


def test_the_held_out_file_beside_the_training_file_is_never_trained_on(tmp_path):
    for name in ("train.json", "eval.json", "more.json"):
        write(tmp_path / name)
    train, held_out = find_files([str(tmp_path)])
    assert [file.rsplit("/")[-1] for file in train] == ["more.json", "train.json"]
    assert [file.rsplit("/")[-1] for file in held_out] == ["eval.json"]


def test_a_file_named_twice_is_read_once_and_given_held_out_files_join_those_that_lie_beside(tmp_path):
    for name in ("train.json", "eval.json"):
        write(tmp_path / name)
    other = write(tmp_path / "other.jsonl")
    (tmp_path / "data").mkdir()
    path = str(tmp_path / "train.json")
    train, _ = find_files([path, str(tmp_path / "data" / ".." / "train.json")])
    assert len(train) == 1
    for name in ("train.json", "eval.json"):
        os.rename(tmp_path / name, tmp_path / "data" / name)
    _, held_out = find_files([str(tmp_path / "data")], [other])
    assert [file.rsplit("/")[-1] for file in held_out] == ["other.jsonl", "eval.json"]


def test_a_file_on_both_sides_is_refused(tmp_path):
    file = write(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a held-out file must not be trained on"):
        find_files([file], [str(tmp_path)])


@pytest.mark.parametrize(
    ("paths", "replay", "problem"),
    [
        (["{0}@2"], [], "'2': write the times per epoch, as in {0}@2x or {0}@0.5x; for a sample use sft.opendata"),
        (["{0}@10%"], [], "'10%': write the times per epoch, as in {0}@2x or {0}@0.5x; for a sample use sft.opendata"),
        (["{0}@0x"], [], "'0x': write the times per epoch, as in {0}@2x or {0}@0.5x"),
        (["{0}@twice"], [], "'twice': write the times per epoch, as in {0}@2x or {0}@0.5x"),
        (["{0}@2x", "{0}"], [], "{0}: is asked for as @2x and as @1x; name it once"),
        (["{0}"], ["{0}"], "{0}: is asked for as @1x and as replay; name it once"),
    ],
)
def test_times_that_make_no_sense_are_refused(tmp_path, paths, replay, problem):
    file = write(tmp_path / "a.json")
    with pytest.raises(ValueError) as error:
        find_files([path.format(file) for path in paths], (), [path.format(file) for path in replay])
    assert str(error.value).endswith(problem.format(file))


def test_a_share_of_replay_that_could_not_be_had_is_refused():
    with pytest.raises(ValueError, match="--replay_path: none of its conversations is kept"):
        mix({"new": 1.0, "old": None}, {"new": 2, "old": 0}, np.array([5, 5]), replay_share=0.1, seed=0)


def test_the_table_says_what_is_taken_where_an_epoch_takes_one_at_least():
    mixture = Mixture([Part("a", 0, 9, 1.0), Part("b", 9, 12, 0.001)], seed=0)
    table = mixture_table(mixture, np.full(12, 10))
    assert table[1:] == [["a", "9", "1", "9", "90", "90.0%"], ["b", "3", "0.001", "1", "10", "10.0%"]]


def test_a_file_is_not_seen_a_hundred_million_times(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="at most 10,000 times per epoch"):
        find_files([f"{tmp_path}/a.json@100000000x"])
