"""What stays of a run beside the model."""

import json

import torch

from sft.report import plot_losses, provenance, write_json


def test_the_provenance_names_the_command_and_the_versions():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"][0].endswith(("python", "python3", "python3.11", "python3.12"))
    assert found["git_commit"] is None or len(found["git_commit"]) == 40


def test_json_is_written_whole_and_in_place_of_the_old(tmp_path):
    write_json(tmp_path / "run.json", {"old": 1})
    write_json(tmp_path / "run.json", {"新": [1.5]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"新": [1.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_loss_curve_is_a_picture_even_of_an_empty_history(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "x": 1}]
    for name, entries in (("full", history), ("empty", [])):
        plot_losses(entries, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size
