"""The run page."""

import re
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from sft.chat.reply import Reply
from sft.report import run_page as report
from sft.report.measures import replies_entry
from sft.report.run_page import RunPage, render_page

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
    return replies_entry(step, QUESTIONS, [Reply(text, ended=True, num_tokens=1) for text in texts])


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
    facts += [
        "ab12",
        "首例</span>",
        ">rejected</span>",
        ">my data.json line 3</span>",
        ">my data.json 第 3 行</span>",
        "1,234,567",
        "1e-05",
    ]
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


def test_replies_before_at_evaluations_and_at_the_end_have_one_row_for_each_step(tmp_path):
    history = [said(0, "old 1", "old 2"), said(10, "mid 1", "mid 2"), said(20, "x", "y"), said(20, "new 1", "new 2")]
    page = shown(RUN | {"log_history": history}, tmp_path)
    order = re.findall(r"(old|mid|new|x|y) ?\d?</div>", page)
    assert order == ["old", "old", "mid", "mid", "new", "new"]


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_the_replies_of_many_evaluations_fit_a_window_of_1100_pixels(browser, tmp_path, locale):
    texts = ["春天来了，" * 40, "word " * 60, "x" * 300, "short"]
    questions = ["你好", "Hello", "写一首关于春天的诗", "What is the capital of France?"]
    replies = [Reply(text, ended=True, num_tokens=1) for text in texts]
    history = [replies_entry(step, questions, replies) for step in range(0, 3600, 300)]
    (tmp_path / "page.html").write_text(shown(finished_run(*texts[:2]) | {"log_history": history}, tmp_path))
    with closing(browser.new_context(locale=locale, viewport={"width": 1100, "height": 800})) as context:
        tab = context.new_page()
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.locator(".replies").count() == 2
        for element in [tab.locator("html"), *tab.locator(".wide").all()]:
            width, inner = element.evaluate("element => [element.scrollWidth, element.clientWidth]")
            assert width <= inner, element.inner_text()[:80]


def test_a_history_without_evaluations_losses_or_numbers_is_a_page_all_the_same(tmp_path):
    assert shown(RUN, tmp_path).count("nothing yet") == 4
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "train_loss": 1.0}]
    assert shown(RUN | {"log_history": history}, tmp_path).count("nothing yet") == 4
    assert shown(RUN | {"log_history": [{"step": 1, "loss": 2.0}]}, tmp_path).count("nothing yet") == 3


def test_long_runs_make_no_long_pages(tmp_path):
    history = [{"step": step, "loss": 1.0 / step, "learning_rate": 1e-5} for step in range(1, 100_001)]
    assert len(shown(RUN | {"log_history": history}, tmp_path)) < 120_000


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
