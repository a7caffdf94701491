"""What stays of a run beside the model."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import metadata_load

from sft.chat.reply import Reply
from sft.report import run_page as report
from sft.report.run_page import RunPage, plot_losses, provenance, render_card, render_page, write_card


def test_the_provenance_names_the_command_and_the_versions():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"][0].endswith(("python", "python3", "python3.11", "python3.12"))
    assert found["git_commit"] is None or len(found["git_commit"]) == 40


def test_the_loss_curve_is_a_picture_even_of_an_empty_history(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "x": 1}]
    for name, entries in (("full", history), ("empty", [])):
        plot_losses(entries, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


QUESTIONS = ["你好", "Hello"]
COUNTS = {"in": 5, "kept": 4, "rejected": 1}
RUN = {
    "command": ["python", "train.py", "--data_path", "my data.json"],
    "versions": {"torch": "2.0"},
    "git_commit": None,
    "model": "owner/base",
    "chat_format": "blossom",
    "example": "|Human|: a\n|Bot|: b",
    "seed": 42,
    "data": {"train": {"my data.json": "ab12"}, "eval": {}},
    "ledger": {
        "train": {"files": {"my data.json": COUNTS}, "total": COUNTS, "first": {"rejected": "my data.json line 3"}},
        "eval": {"files": {}, "total": {}, "first": {}},
    },
    "device": "cpu",
    "parameters": {"all": 1234567, "trained": 1234567},
    "settings": {"learning_rate": 1e-5, "lora": False, "max_steps": 20},
    "log_history": [],
}


def said(step: int, *texts: str) -> dict:
    return report.replies_entry(step, QUESTIONS, [Reply(text, ended=True, num_tokens=1) for text in texts])


def finished_run(*texts: str) -> dict:
    replies = [
        {"question": q, "answers_in_data": [], "after": t, "ended": True} for q, t in zip(QUESTIONS, texts, strict=True)
    ]
    return RUN | {"metrics": {"last_loss": 1.25}, "replies": replies, "log_history": [said(20, *texts)]}


def shown(run: dict, tmp_path) -> str:
    return render_page(run, tmp_path / "my_run" / "model", step=5, steps=20)


def test_the_page_shows_the_facts_of_the_run(tmp_path):
    page = shown(RUN, tmp_path)
    facts = ["<title>my_run</title>", "owner/base", "python train.py --data_path &#39;my data.json&#39;", "torch 2.0"]
    facts += ["ab12", "first</span>", "rejected: <code>my data.json line 3</code>", "1,234,567", "1e-05"]
    assert [fact for fact in facts if fact not in page] == []
    assert "Running" in page and "Finished" not in page


def test_the_page_needs_nothing_from_anywhere(tmp_path):
    history = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "eval_loss": 1.5}, said(2, "a", "b")]
    page = shown(RUN | {"log_history": history}, tmp_path)
    assert not re.search(r"https?:|//\w|\bsrc\b|\bhref\b|url\(|@import|<link|<iframe", page)
    assert "prefers-color-scheme: dark" in page


def test_markup_in_replies_data_and_names_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    run = finished_run(evil, "</div>" + evil) | {"command": [evil], "example": evil, "model": evil, "device": evil}
    counts = {evil: COUNTS}
    run["data"] = {"train": {evil: evil}, "eval": {}}
    run["ledger"] = RUN["ledger"] | {"train": {"files": counts, "total": COUNTS, "first": {evil: evil}}}
    page = render_page(run, tmp_path / evil.replace("/", ""), step=1, steps=1, finished=True)
    assert "alert(1)" in page
    assert page.count("<script>") == 1  # the page's own, which chooses the language
    assert evil not in page


def test_replies_before_at_evaluations_and_at_the_end_stand_side_by_side_each_step_once(tmp_path):
    history = [said(0, "old 1", "old 2"), said(10, "mid 1", "mid 2"), said(20, "x", "y"), said(20, "new 1", "new 2")]
    page = shown(RUN | {"log_history": history}, tmp_path)
    order = re.findall(r"(old|mid|new|x|y) ?\d?</div>", page)
    assert order == ["old", "mid", "new", "old", "mid", "new"]


def test_a_history_without_evaluations_losses_or_numbers_is_a_page_all_the_same(tmp_path):
    assert shown(RUN, tmp_path).count("nothing yet") == 4
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "train_loss": 1.0}]
    assert shown(RUN | {"log_history": history}, tmp_path).count("nothing yet") == 4
    assert shown(RUN | {"log_history": [{"step": 1, "loss": 2.0}]}, tmp_path).count("nothing yet") == 3


def test_a_chart_places_its_points_between_round_numbers():
    layout = report.chart([(0, 0.0), (100, 1.0)], [(50, 0.5)])
    assert layout["lines"] == ["64.0,196.0 616.0,10.0 616.0,10.0", "340.0,103.0 340.0,103.0"]
    assert layout["dots"] == [(340.0, 103.0, "0.5", 50)]
    assert [label for _x, label in layout["across"]] == ["0", "20", "40", "60", "80", "100"]
    assert [label for _y, label in layout["up"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert report.chart([(1, 3.0)], low=0.0)["up"][0] == (196.0, "0")


@pytest.mark.parametrize(("low", "high"), [(0, 7), (3, 3.0001), (1e-6, 5e-6), (0, 123_456), (-0.5, 0.5)])
def test_an_axis_has_three_to_six_ticks_within_its_ends(low, high):
    found = report.ticks(low, high)
    assert 3 <= len(found) <= 6
    assert low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_long_runs_make_no_long_pages(tmp_path):
    history = [{"step": step, "loss": 1.0 / step, "learning_rate": 1e-5} for step in range(1, 100_001)]
    assert len(shown(RUN | {"log_history": history}, tmp_path)) < 120_000


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert report.repetition("") == 0
    assert report.repetition("the cat sat on the mat") == 0
    assert report.repetition("a b a b a b a b") == pytest.approx(3 / 5)
    assert report.repetition("春天来了春天来了") == pytest.approx(1 / 5)
    assert report.repetition("!" * 8) == pytest.approx(4 / 5)


def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all():
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA L40S"]
    assert [report.peak_flops(name) for name in names] == [312e12, 989e12, 756e12, 989e12, 362e12]
    assert [report.peak_flops(name) for name in ("NVIDIA L4", "NVIDIA A10", "Tesla T4")] == [121e12, 125e12, 65e12]
    assert [report.peak_flops(name) for name in ("cpu", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GB10")] == [None] * 4


def test_mfu_counts_six_flops_for_a_trained_parameter_and_none_for_looked_up_rows(tiny_base):
    from sft.model.load import count_parameters, load_model

    model = load_model(str(tiny_base("qwen2")))
    _trained, total = count_parameters(model)
    embedding = model.get_input_embeddings().weight
    counted = total if embedding is model.get_output_embeddings().weight else total - embedding.numel()
    found = report.mfu_of_a_token(model, device="NVIDIA H200", world_size=2)
    assert found == pytest.approx(6 * counted / (2 * 989e12))
    assert report.mfu_of_a_token(model, device="cpu", world_size=1) is None


def state_at(step: int, history: list[dict], *, tokens: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        global_step=step,
        max_steps=20,
        log_history=history,
        num_input_tokens_seen=tokens,
        is_world_process_zero=True,
    )


def run_page(tmp_path, **options) -> RunPage:
    return RunPage(tmp_path, RUN, before=said(0, "old", "old"), questions=QUESTIONS, **options)


def test_the_page_is_there_from_the_start_and_follows_evaluations_and_saves(tmp_path):
    history, asked = [], []
    page = run_page(tmp_path, reply=lambda: asked.append(1) or [Reply("mid", False, 1), Reply("mid", True, 1)])
    page.on_train_begin(None, state_at(0, history), None)
    assert "old" in (tmp_path / "report.html").read_text()
    page.on_evaluate(None, state_at(10, history), None)
    assert "mid" in (tmp_path / "report.html").read_text()
    assert (history[-1]["step"], history[-1]["stop_rate"]) == (10, 0.5)
    page.on_save(None, state_at(15, history), None)
    assert "15" in re.search(r"Running.*?</p>", (tmp_path / "report.html").read_text(), re.DOTALL).group()
    page.on_evaluate(None, state_at(20, history), None)  # the last step: all questions are asked afterwards
    assert len(asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_run_that_left_nothing_but_its_page_can_be_started_again(tmp_path):
    from sft.checkpoint.save import check_output_dir

    (tmp_path / "report.html").write_text("Running")
    assert check_output_dir(str(tmp_path), resume=False) is None
    (tmp_path / "README.md").write_text("mine")
    assert "is not empty" in check_output_dir(str(tmp_path), resume=False)


def test_at_log_lines_the_page_is_written_at_most_twice_a_minute(tmp_path):
    history = []
    page = run_page(tmp_path)
    page.on_train_begin(None, state_at(0, history), None)
    for written_ago, seen in ((1, False), (report.PAGE_SECONDS + 1, True)):
        page.written = time.monotonic() - written_ago
        history.append({"step": 7, "loss": 1.0})
        page.on_log(None, state_at(7, history, tokens=len(history)), None, logs=history[-1])
        assert (re.search(r"</span> 7<span", (tmp_path / "report.html").read_text()) is not None) is seen


def test_speed_counts_the_tokens_since_the_last_line_without_evaluations(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(report.time, "monotonic", lambda: now.seconds)
    history = []
    page = run_page(tmp_path, mfu=1e-4)
    page.on_train_begin(None, state_at(0, history), None)
    for seconds, tokens, evaluated in ((110.0, 5000, 60.0), (180.0, 10_000, 0.0)):
        now.seconds = seconds
        history.append({"step": 1, "loss": 1.0})
        page.on_log(None, state_at(1, history, tokens=tokens), None, logs=history[-1])
        now.seconds += evaluated
        page.on_evaluate(None, state_at(1, history, tokens=tokens), None)
    lines = [entry for entry in history if "loss" in entry]
    assert [line["tokens_per_second"] for line in lines] == [500.0, 500.0]
    assert [line["mfu"] for line in lines] == [0.05, 0.05]
    assert all(line["peak_memory_gib"] > 0 for line in lines)


def test_a_full_disk_does_not_end_the_run_for_the_sake_of_its_page(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_text", refuse)
    run_page(tmp_path).on_train_begin(None, state_at(0, []), None)


def test_the_other_processes_write_nothing_and_keep_no_replies(tmp_path):
    state = state_at(0, [])
    state.is_world_process_zero = False
    page = run_page(tmp_path, reply=lambda: pytest.fail("asked"))
    page.on_train_begin(None, state, None)
    page.on_evaluate(None, state, None)
    assert list(tmp_path.iterdir()) == []


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


def test_licences_are_told_of_the_sources_that_the_data_was_made_from(tmp_path):
    names = ["BelleGroup/train_0.5M_CN", "blossom-math-v4.json", "thesis.json", "belle_alpaca.json"]
    (tmp_path / "ledger.json").write_text(json.dumps({"files": {name: {} for name in names}}))
    belle, sample = report.LICENCES["belle"], "the sample of the training toolkit, its own"
    expected = dict(zip(names, [belle, "Apache-2.0", "unknown", sample], strict=True))
    assert report.licences([str(tmp_path / "train.json")]) == expected
    assert report.licences(["/nowhere/x.json"]) == {"/nowhere/x.json": "unknown"}
