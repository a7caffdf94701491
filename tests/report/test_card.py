"""The model card."""

import json

from huggingface_hub import metadata_load

from sft.report import card
from sft.report.card import render_card, write_card
from tests.report.test_run_page import finished_run


def test_the_card_has_a_head_that_the_hub_reads(tmp_path):
    run = finished_run("好", "Hi")
    run["replies"][0]["answers_in_data"] = ["你好！"]
    assert write_card(tmp_path, run)
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "owner/base",
        "language": ["zh"],
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "conversational"],
    }


def test_the_card_of_an_adapter_names_peft_and_how_to_merge(tmp_path):
    run = finished_run("a", "b") | {"settings": {"lora": True, "lora_rank": 16}, "model": "/a/local/base"}
    write_card(tmp_path, run)
    head = metadata_load(tmp_path / "README.md")
    assert (head["library_name"], head["tags"][-1]) == ("peft", "lora")
    assert "base_model" not in head and "language" not in head  # a path, and no text of the data
    assert f"python -m sft.export --model_path {tmp_path}" in (tmp_path / "README.md").read_text()


def test_a_reply_cannot_leave_its_block_in_the_card():
    card = render_card(finished_run("```\n# Not a heading", "b"), folder="runs/x/model")
    assert "````text\n> 你好\n```\n# Not a heading\n````" in card
    assert "# x\n" in card


def test_a_card_that_somebody_else_wrote_is_left_alone_and_our_own_is_renewed(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(tmp_path, finished_run("a", "b"))
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    assert write_card(tmp_path, finished_run("first", "b")) and write_card(tmp_path, finished_run("second", "b"))
    assert "second" in (tmp_path / "README.md").read_text()


def test_licences_are_listed_of_the_sources_that_the_data_was_made_from(tmp_path):
    names = ["BelleGroup/train_0.5M_CN", "blossom-math-v4.json", "thesis.json", "belle_alpaca.json"]
    (tmp_path / "ledger.json").write_text(json.dumps({"files": {name: {} for name in names}}))
    belle, sample = card.LICENCES["belle"], "the sample of the training toolkit, its own"
    expected = dict(zip(names, [belle, "Apache-2.0", "unknown", sample], strict=True))
    assert card.licences([str(tmp_path / "train.json")]) == expected
    assert card.licences(["/nowhere/x.json"]) == {"/nowhere/x.json": "unknown"}
