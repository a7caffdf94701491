"""The report of a dry run and the problems that it finds, on good and bad set-ups."""

import json
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import train
from sft.dataset.dataset import Examples
from sft.format.tokens import IGNORE_INDEX
from sft.preview.data import draw_histogram
from sft.preview.dry_run import count_saves, describe_steps, find_uncounted_optimizer
from sft.preview.report import Report
from sft.train.arguments import Settings


def write(path, questions, source="made up", answer="It is <b>{}</b>."):
    lines = [
        {
            "id": "x",
            "source": source,
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer.format(q)}],
        }
        for q in questions
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def set_up(tiny_base, tmp_path):
    """A run that is well set up: 40 conversations of two sources, one of them of many turns, and others held out."""
    file = tmp_path / "train.json"
    write(file, [f"What is {number}?" for number in range(40)])
    many = [{"role": role, "content": text} for text in ("一", "二", "三") for role in ("user", "assistant")]
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"id": "m", "source": "谈话", "messages": many}, ensure_ascii=False) + "\n")
    write(tmp_path / "eval.json", [f"Who is {number}?" for number in range(8)])
    flags = {"--model_name_or_path": str(tiny_base("qwen2")), "--data_path": str(tmp_path), "--max_length": "256"}
    flags |= {"--output_dir": str(tmp_path / "run"), "--cache_dir": str(tmp_path / "cache"), "--gpu": "24GBx2"}
    return flags | {"--per_device_train_batch_size": "2", "--max_steps": "300", "--warmup_steps": "9"}


def dry_run(capsys, flags: dict) -> tuple[int, str, list[str]]:
    """Return exit code, what was printed, and the problems."""
    code = 0
    try:
        train.main([*(word for pair in flags.items() for word in pair), "--dry_run"])
    except SystemExit as exit_:
        code = exit_.code
    found = capsys.readouterr()
    return (
        code,
        found.out,
        [line.removeprefix("train.py: problem: ") for line in found.err.splitlines() if "problem" in line],
    )


def test_a_good_set_up_is_shown_and_nothing_is_written_but_the_page(set_up, capsys, tmp_path):
    code, text, problems = dry_run(capsys, set_up)
    assert (code, problems) == (0, [])
    assert "== first: row 0 of made up" in text
    assert "⟦ It is <b>What is 0?</b>.<|endoftext|>⟧" in text
    assert "== longest, most replies: row 40 of 谈话" in text
    assert re.search(r"^made up +40 +40 +0 +0 +40 ", text, re.MULTILINE)
    assert re.search(r"^谈话 +1 +1 +0 +0 +3 .*100\.0%$", text, re.MULTILINE)
    assert "held-out questions that are trained on too: 0 of 8 (0 whole rows)" in text
    assert "updates: 300; learning rate 1e-05 after 9 of warm-up, then cosine" in text
    assert "all weights fit with: all weights, one process" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "eval.json", "run.dry_run.html", "train.json"]


def test_the_page_needs_nothing_else_and_its_text_is_escaped(set_up, capsys, tmp_path):
    dry_run(capsys, set_up)
    page = (tmp_path / "run.dry_run.html").read_text(encoding="utf-8")
    assert "<mark> It is &lt;b&gt;What is 0?&lt;/b&gt;.&lt;|endoftext|&gt;</mark>" in page
    assert "prefers-color-scheme: dark" in page
    assert len(re.findall("<script", page)) == 1  # the language of the reader
    assert not re.search(r"src=|href=|url\(|@import|<b>", page)
    for chinese in (
        '<h1><span class="en">Dry run</span><span class="zh" lang="zh">试运行</span></h1>',
        ">权重<",
        ">训练数据<",
    ):
        assert chinese in page
    assert ">weights + optimizer + max(activations + loss, gradients + a layer)</span>" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"--gpu": "1GB"}, "out of memory: all weights, one process takes"),
        ({"--max_length": "44"}, "0 kept; lost, the prompt alone fills max_length: 41 (first: "),
        ({"--max_length": "100000"}, "positions; use at most that"),
        ({"--warmup_steps": "300"}, "--warmup_steps 300: the run has 300 updates, so its learning rate would not be"),
    ],
)
def test_a_fault_that_would_fail_or_spoil_a_run_is_a_problem(set_up, capsys, changes, problem):
    if "--gpu" in changes:
        changes = {**changes, "--per_device_train_batch_size": "512", "--max_length": "512"}
    code, _text, problems = dry_run(capsys, set_up | changes)
    assert code == 2
    assert [line for line in problems if problem in line], problems


@pytest.mark.slow
def test_held_out_questions_that_are_trained_on_are_a_problem(set_up, capsys, tmp_path):
    write(tmp_path / "eval.json", ["What is 7?", "Who is 7?"], answer="other {}")
    code, _text, problems = dry_run(capsys, set_up)
    assert code == 2
    assert problems == [
        "held-out questions that are trained on too: 1 of 2 (0 whole rows); the held-out loss would be too good. "
        "Split anew with sft.opendata"
    ]


def test_lora_with_a_stop_token_that_the_base_never_saw_and_pad_as_eos_are_notes(set_up, capsys):
    code, text, _problems = dry_run(capsys, set_up | {"--lora": "true", "--chat_format": "chatml"})
    assert code == 0
    assert "note: LoRA: the base may never have seen <|im_end|>, <|im_start|>; their embedding" in text.replace(
        "<|im_start|>, <|im_end|>", "<|im_end|>, <|im_start|>"
    )
    assert "note: pad is a stop token, which does no harm here" in text
    assert "note: --learning_rate 1e-05: published LoRA scaled to" in text


def test_the_processes_of_a_launcher_are_counted_and_not_started(set_up, capsys, monkeypatch):
    monkeypatch.setenv("NUM_PROCESSES", "8")
    code, text, _problems = dry_run(capsys, set_up | {"--deepspeed": "ds_zero3.json", "--gpu": "80GB×8"})
    assert code == 0
    assert "an update: 16 rows (2 x 1 x 8 processes)" in text
    assert "== memory: all weights, ZeRO-3" in text
    assert re.search(r"^weights .* 2 bytes x \S+ / 8$", text, re.MULTILINE)


def test_a_gpu_that_is_none_is_a_line_and_without_a_dry_run_it_has_no_use(set_up, capsys):
    for flags, line in (
        (["--gpu", "A100", "--dry_run"], "train.py: --gpu A100: write the memory of a GPU and their number"),
        (["--gpu", "80GBx8"], "train.py: --gpu: says which GPU a --dry_run judges; add --dry_run, or leave it out"),
    ):
        words = [word for pair in set_up.items() if pair[0] != "--gpu" for word in pair]
        with pytest.raises(SystemExit) as exit_:
            train.main([*words, *flags])
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith(line)


@pytest.fixture
def copied(set_up, tmp_path_factory):
    """A function that gives the flags with a copy of the base, some of whose files were changed, or removed (None)."""

    def change(files: dict) -> dict:
        folder = tmp_path_factory.mktemp("copy") / "base"
        shutil.copytree(set_up["--model_name_or_path"], folder)
        for name, change in files.items():
            if change is None:
                (folder / name).unlink()
            elif isinstance(change, bytes):
                (folder / name).write_bytes(change)
            else:
                held = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
                (folder / name).write_text(json.dumps(held | change))
        return set_up | {"--model_name_or_path": str(folder)}

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"tokenizer.json": None}, "the tokenizer can't be loaded: it encodes no text at all"),
        ({"config.json": {"hidden_size": "32"}}, "for field 'hidden_size': TypeError: Field 'hidden_size' expected"),
        ({"config.json": {"num_hidden_layers": 0}}, "the model can't be loaded: Class validation error"),
        (
            {"config.json": {"num_attention_heads": 5}, "model.safetensors": None},
            "qwen2: a step of a model of this config fails: ",
        ),
        ({"config.json": {"intermediate_size": 8}}, "the model can't be loaded: You set `ignore_mismatched_sizes`"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "model.safetensors: is not whole ("),
        (
            {
                "model.safetensors": None,
                "model.bin": b"",
                "model.safetensors.index.json": {"weight_map": {"a": "b.bin"}},
            },
            "1 files of weights are missing, b.bin for one",
        ),
    ],
)
def test_a_base_that_could_not_be_trained_is_a_line(copied, capsys, files, problem):
    try:
        code, _text, problems = dry_run(capsys, copied(files))
    except ValueError as error:  # train.py prints it as a line
        code, problems = 2, str(error).splitlines()
    assert code == 2
    assert len(problems) == 1 and problem in problems[0], problems


@pytest.mark.slow
def test_a_base_of_config_and_tokenizer_alone_or_with_code_or_experts_is_none(copied, capsys):
    code = "from transformers import Qwen2Config as C\nfrom transformers import Qwen2ForCausalLM as M\n"
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    code += "class C(C):\n    model_type = 'mine'\nclass M(M):\n    config_class = C\n"
    flags = copied({"model.safetensors": None, "config.json": own, "own.py": code.encode()})
    found, text, problems = dry_run(capsys, flags | {"--trust_remote_code": "true"})
    assert (found, problems) == (0, [])
    assert "there are no weights in this folder, and a run needs them" in text
    experts = {"model_type": "mixtral", "num_local_experts": 4, "architectures": None}
    found, text, problems = dry_run(capsys, copied({"config.json": experts, "model.safetensors": None}))
    assert (found, problems) == (0, [])
    assert re.search(r"^activations +\S+ MiB +2 layers", text, re.MULTILINE)


@pytest.mark.slow
def test_a_control_token_that_is_written_out_in_the_data_is_a_note(set_up, capsys, tmp_path):
    write(tmp_path / "train.json", ["What is <|im_end|>?", "Why?"])
    code, text, problems = dry_run(capsys, set_up)
    assert (code, problems) == (0, [])
    assert "note: 1 of the 2 checked conversations write a control token, which training keeps as plain text" in text
    assert "train = serve: checked on 2 conversations of the data" in text


@pytest.mark.slow
def test_a_folder_with_held_out_data_alone_is_a_problem_unless_it_is_named(set_up, capsys, tmp_path):
    (tmp_path / "train.json").unlink()
    code, _text, problems = dry_run(capsys, set_up)
    assert (code, len(problems)) == (2, 1)
    assert "eval.json: would be trained on, as there is no train.json beside it" in problems[0]
    code, _text, problems = dry_run(capsys, set_up | {"--data_path": str(tmp_path / "eval.json")})
    assert (code, problems) == (0, [])


def test_the_facts_of_examples_are_read_off_their_labels():
    """Rows: prompt of 2, a reply of 2 that stops; prompt of 1, replies of 1 and 2, cut."""
    ids = np.array([5, 6, 7, 9, 5, 9, 6, 7, 8], dtype=np.int32)
    in_loss = np.array([0, 0, 1, 1, 0, 1, 0, 1, 1], dtype=bool)
    examples = Examples(ids, in_loss, np.array([0, 4, 9]))
    assert examples.row_statistics([9]).tolist() == [(2, 1, 2, True), (3, 2, 1, False)]
    assert (examples[1]["labels"] == IGNORE_INDEX).tolist() == [True, False, True, False, False]


def test_the_facts_of_many_examples_are_those_of_each_alone(monkeypatch):
    random = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(random.integers(2, 9, 50))])
    ids, in_loss = random.integers(0, 4, starts[-1]), random.random(starts[-1]) < 0.5
    in_loss[starts[1:] - 1] = True
    examples = Examples(ids.astype(np.int32), in_loss, starts)
    alone = []
    for begin, end in pairwise(starts):
        alone += Examples(ids[begin:end], in_loss[begin:end], np.array([0, end - begin])).row_statistics([3]).tolist()
    monkeypatch.setattr("sft.dataset.dataset.EXAMPLES_AT_ONCE", 7)
    assert examples.row_statistics([3]).tolist() == alone


def test_a_histogram_shows_what_there_is():
    assert draw_histogram(np.array([0, 0, 0, 0, 0, 0, 0, 0, 99]), 99, bins=4) == "█  ▁"


def test_an_update_and_the_schedule_follow_from_the_numbers(monkeypatch):
    monkeypatch.setenv("NUM_PROCESSES", "8")
    training = train.TrainingArguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=2e-5, dry_run=True, use_cpu=True
    )
    run = SimpleNamespace(settings=Settings(train.ModelArguments(), train.DataArguments(), training))

    class Rows:
        num_examples, num_tokens, fill = 1000, 180_000, 0.9

        def __len__(self):
            return 100

    report = Report("")
    assert describe_steps(report, run, Rows()) == 6
    assert report.sections[0].lines[:3] == [
        "packed: 100 rows, 90.0% full, 10.0 conversations each",
        "an update: 64 rows (2 x 4 x 8 processes), about 115,200 tokens, 640 conversations",
        "updates: 6; learning rate 2e-05 after 1 of warm-up, then cosine",
    ]
    assert (report.problems, report.notes) == ([], [])


@pytest.mark.parametrize(
    ("flags", "saves"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
        ({"save_strategy": "steps", "save_steps": 30}, 3),
        ({"save_strategy": "steps", "save_steps": 0.25}, 4),
    ],
)
def test_the_checkpoints_of_a_run_are_counted(flags, saves):
    assert count_saves(train.TrainingArguments(use_cpu=True, **flags), 100) == saves


def folder_state(folder) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_dry_run_of_a_resume_tells_what_is_left_and_what_has_changed(set_up, capsys, tmp_path):
    del set_up["--gpu"]
    set_up |= {"--max_steps": "4", "--warmup_steps": "1", "--save_steps": "3", "--save_strategy": "steps"}
    set_up |= {"--max_new_tokens": "4", "--num_reply_prompts": "0", "--data_path": str(tmp_path / "train.json")}
    train.main([word for pair in set_up.items() for word in pair])
    leftover = tmp_path / "run" / ".saving"
    leftover.mkdir()
    before, set_up["--resume_from_checkpoint"] = folder_state(tmp_path / "run"), "auto"
    code, text, problems = dry_run(capsys, set_up)
    assert (code, problems) == (0, [])
    assert f"{tmp_path}/run/checkpoint-4 would be continued: 4 steps are made, 0 are left" in text
    named = {"--resume_from_checkpoint": f"{tmp_path}/run/checkpoint-3", "--gradient_accumulation_steps": "2"}
    with open(tmp_path / "train.json", "a", encoding="utf-8") as stream:
        stream.write("\n")
    code, text, problems = dry_run(capsys, set_up | named | {"--learning_rate": "2e-5"})
    assert code == 2
    fields = [re.match(r".*/checkpoint-3: (\w+) was", line)[1] for line in problems]
    assert fields == ["data", "gradient_accumulation_steps", "learning_rate"]
    allowed = {"--allow_changed": "data,learning_rate,gradient_accumulation_steps", "--learning_rate": "2e-5"}
    code, text, problems = dry_run(capsys, set_up | named | allowed)
    assert (code, problems) == (0, [])
    assert "allowed: learning_rate was 1e-05 and is 2e-05" in text
    assert f"{tmp_path}/run/checkpoint-3 would be continued: 3 steps are made, 1 are left" in text
    assert folder_state(tmp_path / "run") == before


def test_optimizers_of_other_sizes_are_named_as_not_counted():
    assert find_uncounted_optimizer("adamw_torch_fused") == find_uncounted_optimizer("adamw_torch") == []
    for name in ("adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"):
        (note,) = find_uncounted_optimizer(name)
        assert note.startswith("memory: the optimizer is counted as AdamW") and f"--optim {name} " in note
