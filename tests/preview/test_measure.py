"""The steps of a probe, its measurements and lines; and that no file of it remains."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import IntervalStrategy

import train
from sft.dataset.dataset import Examples, TrainingRows
from sft.dataset.packing import Rows
from sft.preview import measure as probe
from sft.preview.data import heaviest_rows
from sft.preview.report import Report
from sft.train import setup
from tests.preview.test_dry_run import dry_run, set_up  # noqa: F401 (a fixture)
from tests.scripts import sh


def test_the_heaviest_rows_come_twice_then_the_runs_own():
    rows = SimpleNamespace(rows=np.arange(60, 66), examples=None)
    heaviest, own = np.array([5, 4, 3, 2, 1, 0]), np.array([2, 0, 4, 1, 5, 3])
    found = probe.FirstRows(rows, heaviest, own, steps=4, per_update=2)
    assert found.rows == [65, 64, 65, 64, 62, 60, 64, 61]
    few = probe.FirstRows(rows, np.array([2, 0, 1]), np.array([0, 1, 2]), steps=5, per_update=4)
    assert few.rows == [62, 60, 61]


def test_padded_rows_are_heavy_by_length_and_packed_ones_by_trained_tokens():
    """Examples of 2, 4 and 3 tokens, of which 1, 1 and 3 are trained; packed as [1] and [0, 2]."""
    lengths = np.array([0, 2, 6, 9])
    in_loss = np.array([0, 1, 0, 0, 0, 1, 1, 1, 1], bool)
    examples, trained = Examples(np.zeros(9, np.int32), in_loss, lengths), np.array([1, 1, 3])
    padded = heaviest_rows(TrainingRows(examples, None, seed=0), trained)
    assert [part.tolist() for part in padded] == [[1, 2, 0], [4, 3, 2], [1, 3, 1]]
    packed = TrainingRows(examples, 5, seed=0)
    packed.rows = Rows(np.array([1, 0, 2]), np.array([0, 1, 3]))
    assert [part.tolist() for part in heaviest_rows(packed, trained)] == [[1, 0], [5, 4], [4, 1]]


def test_the_first_steps_are_not_timed_and_the_median_of_the_others_is_printed():
    watch = probe.Stopwatch()
    watch.ends = [(10.0, 100), (15.0, 200), (16.0, 300), (18.0, 500), (19.0, 620)]
    assert watch.timed() == [(1.0, 100), (2.0, 200), (1.0, 120)]
    report = Report("")
    probe.describe_measured(report, watch.timed(), [2**30, 2**31], steps=7200, counted=2**31)
    assert report.sections[0].title == "measured on 2 processes"
    assert report.sections[0].lines[1:] == [
        "speed: 100 tokens/s without padding, 1 s a step (median)",
        "the run: 7,200 steps take about 2 h, without start, evaluations, replies, saves",
        "peak memory (resident, process with most): 2.0 GiB, counted 2.0 GiB (1.00 of it)",
    ]
    probe.describe_measured(report, watch.timed(), [2**31], steps=1, counted=2**30)
    assert report.sections[1].lines[-1].startswith("that is far from what was counted")


@pytest.mark.parametrize(
    ("seconds", "text"), [(48.2, "48.2 s"), (720, "12 min"), (19_800, "5.5 h"), (864_000, "10 days")]
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert probe.format_duration(seconds) == text


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"--packing": "false", "--lora": "true"}])
def test_a_probe_shows_the_whole_report_and_leaves_the_page_alone_behind(set_up, capsys, tmp_path, flags):  # noqa: F811
    del set_up["--gpu"]
    set_up |= {"--probe_steps": "4", "--gradient_accumulation_steps": "2", **flags}
    code, text, problems = dry_run(capsys, set_up)
    assert (code, problems) == (0, [])
    assert "== first: row 0 of made up" in text
    assert re.search(r"== measured\n2 steps of the rows that take most memory, not timed; then 2 of those", text)
    assert re.search(r"^speed: [\d,]+ tokens/s without padding, \S+ s a step", text, re.MULTILINE)
    assert re.search(r"^the run: 300 steps take about .*, without start, evaluations", text, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "eval.json", "run.dry_run.html", "train.json"]
    page = (tmp_path / "run.dry_run.html").read_text(encoding="utf-8")
    assert re.search(r"<h2>.*measured.*</h2>\s.*2 steps of the rows that take most memory", page, re.S)


@pytest.mark.slow
def test_running_out_of_memory_in_a_probe_is_one_line(set_up, capsys, monkeypatch, tmp_path):  # noqa: F811
    def no_room(*_arguments, **_options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    del set_up["--gpu"]
    monkeypatch.setattr(train.Trainer, "training_step", no_room)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        train.main([*(word for pair in set_up.items() for word in pair), "--probe_steps", "3"])
    assert not (tmp_path / "run.probe").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"--probe_steps": "2"}, "train.py: --probe_steps 2: at least 3, as the first two are not timed"),
        ({"--probe_steps": "3"}, "train.py: --gpu: judges another machine, and --probe_steps measures this one"),
    ],
)
def test_a_probe_that_makes_no_sense_is_a_line(set_up, capsys, flags, line):  # noqa: F811
    with pytest.raises(SystemExit) as exit_:
        train.main([word for pair in (set_up | flags).items() for word in pair])
    assert exit_.value.code == 2
    assert line in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3"])
def test_a_probe_runs_on_all_processes_of_the_launcher(zero, set_up, tmp_path):  # noqa: F811
    knobs = {"MODEL": set_up["--model_name_or_path"], "DATA": str(tmp_path / "train.json"), "MAX_LENGTH": "256"}
    knobs |= {"BATCH_SIZE": "2", "ACCUMULATION": "2", "NUM_GPUS": "2", "ZERO": zero, "OUTPUT": str(tmp_path / "run")}
    done = sh("ds_all.sh", "--probe_steps", "3", "--cache_dir", str(tmp_path / "cache"), DRY_RUN="1", **knobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "an update: 4 rows (2 x 1 x 2 processes)" in done.stdout
    assert "== measured on 2 processes" in done.stdout
    assert done.stdout.count("== steps") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.dry_run.html"]


@dataclass
class SomeSettings:
    training: SimpleNamespace
    data: SimpleNamespace


@dataclass
class SomeRun:
    settings: SomeSettings
    output_dir: str = "runs/one"


@pytest.mark.parametrize(("max_steps", "seconds"), [(-1, 100.0), (1000, 800.0)])
def test_a_probe_chooses_the_kernels_of_the_whole_run(max_steps, seconds, monkeypatch):
    """At 0.01 s a token: three epochs of 10,000 / 3 tokens take 100 s, 1000 updates of 8 rows of 10 tokens 800 s."""
    training = SimpleNamespace(max_steps=max_steps, probe_steps=5, num_train_epochs=3, world_size=1)
    training.train_batch_size, training.gradient_accumulation_steps = 2, 4
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(training, name, IntervalStrategy.STEPS)
    run = SomeRun(SomeSettings(training, SimpleNamespace(packing=True, max_length=10)))
    data = SimpleNamespace(examples=SimpleNamespace(lengths=np.full(1000, 10 / 3)))
    monkeypatch.setattr(setup, "mfu_of_a_token", lambda model, **options: 0.01 * setup.USUAL_MFU)
    measured = probe._measured_run(run, "elsewhere")
    assert measured.settings.training.max_steps == 5
    assert setup.estimate_seconds(measured, data, None, "a GPU") == pytest.approx(seconds)
    assert setup.estimate_seconds(run, data, None, "a GPU") == pytest.approx(seconds)
