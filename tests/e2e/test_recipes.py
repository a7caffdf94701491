"""Each recipe is sound from a model's public config alone: the shell makes the command, a dry run judges it."""

import csv
import json
import math
import os
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoTokenizer

import train
from sft.preview import dry_run, memory
from sft.tiny import sample_texts
from tests.conftest import ROOT
from tests.families import FAMILIES
from tests.preview.test_memory import PUBLISHED

PUBLISHED_RUNS = list(csv.DictReader(dry_run.PUBLISHED_RUNS.read_text(encoding="utf-8").splitlines()))
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh"))
KNOBS = ("MODEL", "DATA", "OUTPUT", "EPOCHS", "LEARNING_RATE", "MAX_LENGTH", "BATCH_SIZE", "ACCUMULATION")
KNOBS += ("ZERO", "OFFLOAD", "NUM_GPUS", "NUM_PROCESSES", "HOSTFILE", "NNODES", "SLURM_JOB_ID", "REPLAY")
EIGHT = {"NUM_GPUS": "8", "--gpu": "80GBx8"}
ONE = {"NUM_GPUS": "1"}
SMALL = {**ONE, "LEARNING_RATE": "2e-5"}
BIG = {**EIGHT, "ZERO": "3", "OFFLOAD": "1"}
# docs/recipes.md and Blossom's other bases: recipe, model, family of the tokenizer, knobs, what the dry run says.
CASES = [
    ("bloom.sh", "bloom-560m", "bloom", {**SMALL, "--gpu": "24GB"}, "8 rows (1 x 8 x 1 processes)"),
    ("bloom.sh", "bloom-1b7", "bloom", {**SMALL, "--gpu": "48GB"}, "learning rate 2e-05"),
    ("bloom.sh", "bloom-3b", "bloom", {**SMALL, "--gpu": "80GB"}, "then linear"),
    ("bloom.sh", "bloom-7b1", "bloom", EIGHT, "8 rows (1 x 1 x 8 processes)"),
    ("falcon.sh", "falcon-rw-1b", "falcon-rw", {**SMALL, "--gpu": "40GB"}, "16 rows (1 x 16 x 1 processes)"),
    ("falcon.sh", "falcon-7b", "falcon", EIGHT, "learning rate 1e-05"),
    ("qwen.sh", "Qwen1.5-4B", "qwen2", {"NUM_GPUS": "4", "--gpu": "48GBx4"}, "16 rows (1 x 4 x 4 processes)"),
    ("qwen.sh", "Qwen1.5-14B", "qwen2", EIGHT, "16 rows (1 x 2 x 8 processes)"),
    ("qwen.sh", "Qwen2.5-7B", "qwen2", EIGHT, "a reply ends in <|im_end|>"),
    ("qwen.sh", "Qwen3-8B-Base", "qwen3", EIGHT, "chat format chatml"),
    ("yi.sh", "Yi-6B", "yi", EIGHT, "1 rows of 4,096 tokens, with checkpointing"),
    ("yi.sh", "Yi-9B", "yi", EIGHT, "then constant"),
    ("yi.sh", "Yi-1.5-9B", "yi", EIGHT, "chat format blossom"),
    ("yi.sh", "Yi-34B", "yi", BIG, "memory: all weights, ZeRO-3 with offload"),
    ("mistral.sh", "Mistral-7B-v0.1", "mistral", EIGHT, "learning rate 2e-05"),
    ("mistral.sh", "Mistral-7B-v0.3", "mistral", EIGHT, "chat format mistral"),
    ("qwen3.sh", "Qwen3-8B", "qwen3", {**ONE, "--gpu": "24GB"}, "2 rows (1 x 2 x 1 processes)"),
    ("qwen3.sh", "Qwen3-30B-A3B", "qwen3", {**ONE, "--gpu": "80GB"}, "published: Qwen3-8B LoRA (r 8 alpha 32"),
    ("qwen3.5.sh", "Qwen3.5-4B", "qwen2", {**ONE, "--gpu": "24GB"}, "published: Qwen3.5-4B LoRA (r 8 alpha 32"),
    (
        "qwen3.5.sh",
        "Qwen3.5-35B-A3B",
        "qwen2",
        {**ONE, "--gpu": "80GB"},
        "Qwen3.5-35B-A3B LoRA (r 8 alpha 32",
    ),
    ("llama3.sh", "Llama-3.1-8B", "yi", EIGHT, "8 rows (1 x 1 x 8 processes)"),
    ("llama3.sh", "Llama-3.2-3B", "yi", {"NUM_GPUS": "4", "--gpu": "48GBx4"}, "then linear"),
    ("gemma3.sh", "gemma-3-1b-it", "yi", {**ONE, "--gpu": "24GB"}, "2e-4 at 4 rows of 512 tokens, 3 epochs"),
    ("glm4.sh", "GLM-4-9B-0414", "qwen2", {**ONE, "--gpu": "40GB"}, "(r 8 alpha 32 on q k v), 5e-4 at 8 conversations"),
    ("glm4.7-flash.sh", "GLM-4.7-Flash", "qwen2", {**ONE, "--gpu": "80GB"}, "8 rows (1 x 8 x 1 processes)"),
    ("gpt-oss.sh", "gpt-oss-20b", "qwen2", {**ONE, "--gpu": "80GB"}, "then cosine_with_min_lr"),
    ("blossom-v5-stage1.sh", "Yi-9B", "yi", EIGHT, "chat format blossom; a reply ends in <|endoftext|>"),
    ("blossom-v5-stage1.sh", "Qwen1.5-14B", "qwen2", EIGHT, "chat format blossom"),
    ("blossom-v5-stage1.sh", "Yi-34B", "yi", BIG, "memory: all weights, ZeRO-3 with offload"),
    ("blossom-v5-stage2.sh", "Yi-9B", "yi", EIGHT, "16 rows (1 x 2 x 8 processes)"),
]
# Their linear attention is a loop over the chunks of a row: counting rows of 128K tokens takes 15 s.
LOOPS = {"Qwen3.5-4B", "Qwen3.5-35B-A3B"}


@pytest.fixture
def base(tmp_path):
    """A function that writes a model's folder: its public config, a tiny tokenizer of its family, no weights."""

    def write(name: str, family: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        FAMILIES[family].tokenizer(sample_texts(), folder, 2048)
        ids = {"eos_token_id": AutoTokenizer.from_pretrained(folder).eos_token_id}
        kind, shape, _parameters = PUBLISHED[name]
        AutoConfig.for_model(kind, **shape, **ids).save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def data(tmp_path) -> str:
    """Questions with answers of Belle's length, two thousand to train on and twenty held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("train", 2000), ("eval", 20)):
        rows = [{"instruction": f"{name} {n}?", "output": f"{n} " + "and " * 200} for n in range(number)]
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def recipe(name: str, *flags: str, cwd=ROOT, **knobs: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in KNOBS}
    settings = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DRY_RUN": "1", **knobs}
    command = ["dash", str(ROOT / "recipes" / name), *flags]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def command_of(tmp_path):
    """A function that returns the arguments that a recipe gives to train.py, without starting it."""
    fake = tmp_path / "python"
    processes = '[ "$3" = --processes ] && echo "${NUM_GPUS:-8}" && exit'
    fake.write_text(f'#!/bin/sh\n{processes}\nshift\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def read(name: str, *flags: str, **knobs: str) -> list[str]:
        done = recipe(name, *flags, cwd=tmp_path, PYTHON=str(fake), **knobs)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return read


def judge(capsys, monkeypatch, arguments: list[str], processes: str) -> tuple[int, str, list[str]]:
    """Dry-run the arguments in this process; return exit code, what was printed, and the problems."""
    monkeypatch.setenv("NUM_PROCESSES", processes)
    monkeypatch.chdir(ROOT)
    code = 0
    try:
        train.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    found = capsys.readouterr()
    return code, found.out, [line for line in found.err.splitlines() if "problem" in line]


def test_every_recipe_and_every_model_has_its_case():
    assert sorted({case[0] for case in CASES}) == RECIPES
    assert {case[1] for case in CASES} == set(PUBLISHED)


@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/zh/recipes.md"])
def test_the_table_of_the_docs_holds_the_cases_and_the_numbers_of_their_commands(page, command_of):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| `(.*)sh recipes/(\S+\.sh)` \| (\S+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len([case for case in CASES if not case[0].startswith("blossom")])
    for model, typed, recipe, gpu, rest in rows:
        (settings,) = (case[3] for case in CASES if case[:2] == (recipe, model))
        knobs = dict(knob.split("=") for knob in typed.split())
        assert knobs.get("MODEL", model).endswith(model)
        default = {"NUM_GPUS": "1" if "--lora" in command_of(recipe) else "8", "--gpu": gpu}
        assert {**default, **{name: value for name, value in knobs.items() if name != "MODEL"}} == settings
        arguments = command_of(recipe, **knobs)
        rate, shape, epochs, adapters, sources = rest.split(" | ")
        rank, alpha = flag(arguments, "--lora_rank"), flag(arguments, "--lora_alpha")
        assert (rate, epochs) == (flag(arguments, "--learning_rate"), flag(arguments, "--num_train_epochs"))
        assert shape == f"{rows_of_an_update(arguments, settings)} x {flag(arguments, '--max_length')}"
        assert adapters.strip() == (f"r {rank}, alpha {alpha}" if rank else "")
        links = re.findall(r"\]\((\S+?)\)", sources)
        assert links and set(links) <= {row["source"] for row in PUBLISHED_RUNS if recipe in row["recipes"].split()}


def flag(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def rows_of_an_update(arguments: list[str], settings: dict[str, str]) -> int:
    sizes = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
    return math.prod(int(flag(arguments, name)) for name in sizes) * int(settings["NUM_GPUS"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_of_a_recipe_are_published_and_its_header_names_the_source(name, command_of):
    """Epochs of our own judgement are those of a run for which none are published."""
    runs = [row for row in PUBLISHED_RUNS if name in row["recipes"].split()]
    arguments, header = command_of(name), (ROOT / "recipes" / name).read_text(encoding="utf-8").replace("\n#  ", "")
    assert flag(arguments, "--learning_rate") in {row["learning_rate"] for row in runs}
    epochs = {row["epochs"] for row in runs} - {""}
    assert not epochs or flag(arguments, "--num_train_epochs") in epochs
    adapters = f"r {flag(arguments, '--lora_rank')} alpha {flag(arguments, '--lora_alpha')} on"
    assert {row["method"] for row in runs} == {"lora" if "--lora" in arguments else "full"}
    assert all(row["lora"].startswith(adapters) for row in runs if row["lora"])
    for row in runs:
        where = re.sub(r"/blob/(main|master)/.*", "", row["source"].removeprefix("https://")).replace("/abs/", " ")
        assert where.replace("arxiv.org", "arXiv") in header, row["run"]
        assert row["learning_rate"] in header


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "family", "settings", "said"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES],
)
def test_a_recipe_passes_the_dry_run_on_the_hardware_that_it_names(
    name, model, family, settings, said, base, data, command_of, capsys, monkeypatch, tmp_path
):
    first = next(case for case in CASES if PUBLISHED[case[1]][0] == PUBLISHED[model][0])
    if (name, model) != first[:2]:  # models of a type have the same tiny twin; other ways take seconds to count
        monkeypatch.setattr(dry_run, "try_on_twin", lambda *_arguments: None)
        monkeypatch.setattr(dry_run, "plan_table", lambda *_arguments: [["way"]])
        monkeypatch.setattr(dry_run, "longest_rows", lambda *_arguments: [])
    if model in LOOPS:
        monkeypatch.setattr(memory, "MAX_ROW_TOKENS", 2048)
    knobs = {key: value for key, value in settings.items() if not key.startswith("--")}
    knobs |= {"MODEL": base(model, family), "DATA": data, "OUTPUT": str(tmp_path / "run")}
    arguments = command_of(name, "--gpu", settings["--gpu"], "--cache_dir", str(tmp_path / "cache"), **knobs)
    code, text, problems = judge(capsys, monkeypatch, arguments, settings["NUM_GPUS"])
    assert (code, problems) == (0, [])
    assert said in text
    assert f"{PUBLISHED[model][2]:,} parameters" in text
    assert "note: --learning_rate" not in text


def test_flags_come_last_and_a_recipe_runs_from_any_folder(command_of):
    arguments = command_of("yi.sh", "--seed", "7", "--learning_rate", "3e-6", MODEL="a b/c", DATA="d e")
    assert arguments[:5] == ["--model_name_or_path", "a b/c", "--data_path", "d e", "--output_dir"]
    assert arguments[-4:] == ["--seed", "7", "--learning_rate", "3e-6"]
    assert arguments[arguments.index("--deepspeed") + 1] == "ds_zero2.json"


def test_the_stages_of_blossom_follow_each_other(command_of):
    first, second = (command_of(f"blossom-v5-stage{stage}.sh") for stage in (1, 2))
    output = first[first.index("--output_dir") + 1]
    assert output == "runs/blossom-v5-stage1/model"
    assert second[second.index("--model_name_or_path") + 1] == output


@pytest.mark.slow
def test_the_second_stage_takes_another_tenth_of_the_first_in_each_epoch(
    base, data, command_of, capsys, monkeypatch, tmp_path
):
    first = tmp_path / "first"
    first.mkdir()
    rows = [{"instruction": f"earlier {n}?", "output": f"{n} " + "and " * 200} for n in range(4000)]
    (first / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    knobs = {"MODEL": base("Yi-9B", "yi"), "DATA": data, "REPLAY": f"{first}@0.1x", "OUTPUT": str(tmp_path / "run")}
    arguments = command_of(
        "blossom-v5-stage2.sh", "--gpu", "80GBx8", "--cache_dir", str(tmp_path / "cache"), **knobs, NUM_GPUS="8"
    )
    code, text, problems = judge(capsys, monkeypatch, arguments, "8")
    assert (code, problems) == (0, [])
    assert re.search(r"first/train\.json +4,000 +0\.1 +400 ", text)
    assert re.search(r"data/train\.json +2,000 +1 +2,000 ", text)


@pytest.mark.slow
def test_a_recipe_under_sh_with_python_for_real(base, data, tmp_path):
    knobs = {"MODEL": base("bloom-560m", "bloom"), "DATA": data, "OUTPUT": str(tmp_path / "run"), "NUM_GPUS": "8"}
    done = recipe("bloom.sh", "--gpu", "80GBx8", "--cache_dir", str(tmp_path / "cache"), cwd=tmp_path, **knobs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no problem found; nothing was trained" in done.stdout
    assert "an update: 8 rows (1 x 1 x 8 processes)" in done.stdout


@pytest.mark.slow
def test_on_hardware_that_is_too_small_it_says_so_and_exits_2(base, data, tmp_path):
    knobs = {"MODEL": base("Yi-9B", "yi"), "DATA": data, "OUTPUT": str(tmp_path / "run"), "NUM_GPUS": "2"}
    done = recipe("yi.sh", "--gpu", "24GBx2", "--cache_dir", str(tmp_path / "cache"), cwd=tmp_path, **knobs)
    assert done.returncode == 2
    line = "train.py: problem: out of memory: all weights, ZeRO-2 takes "
    assert [found for found in done.stderr.splitlines() if found.startswith(line) and "(--gpu 24GBx2); use" in found]
