"""README and docs: links, twins in Chinese, flags that exist, and the commands of the blocks marked `sh run`."""

import functools
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_layout import tracked

DOCS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
PAIRS = [("README.md", "README.zh.md"), *((f"docs/{name}", f"docs/zh/{name}") for name in DOCS)]
PAGES = [page for pair in PAIRS for page in pair]
# In this order: later pages use the files of earlier ones.
RUN_ORDER = ["data.md", "train.md", "chat.md", "deploy.md", "evaluate.md", "dry-run.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The program whose --help lists the flags of the launchers and recipes.
TRAIN = ("train.py",)
LAUNCHERS = ("base_run.sh", "ds_all.sh")
# Flags in the text that belong to other programs: benchmarks/memory_check.py, vLLM, accelerate launch, Slurm.
FOREIGN_FLAGS = {
    "--table",
    "--only",  # of benchmarks/run_gpu.sh
    "--tokenizer",
    "--enable",
    "--num_processes",
    "--mixed_precision",
    "--dynamo_backend",
    "--cpu",
    "--ntasks",
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: (info string, text)."""
    return FENCE.findall(read(page))


def without_code(page: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(page)))


def outline(page: str) -> list[str]:
    """A mark for each heading, bullet and table row, equal in both languages."""
    marks = (re.match(r"#+ |\* |\|", line) for line in FENCE.sub("", read(page)).splitlines())
    return [mark.group() for mark in marks if mark]


def without_comments(text: str) -> list[str]:
    return [re.sub(r"\s+# .*", "", line) for line in text.splitlines()]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(text: str) -> list[list[str]]:
    """The words of each simple command in a block; variables stay as they are."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


@functools.cache
def flags_of(program: tuple[str, ...]) -> frozenset[str]:
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"(?<![\w-])--\w[\w-]*", done.stdout))


def program_of(words: list[str]) -> tuple[str, ...] | None:
    """The project's program in a command line, as arguments of python; None for others' programs."""
    for number, word in enumerate(words[:-1]):
        if word in ("python", "python3"):
            if words[number + 1] != "-m":
                return (words[number + 1],)
            return ("-m", *words[number + 2 : number + (4 if words[number + 2] == "sft.checkpoint" else 3)])
        if word == "sh" and (words[number + 1] in LAUNCHERS or words[number + 1].startswith("recipes/")):
            return TRAIN
    return None


def mentioned(page: str) -> list[tuple[tuple[str, ...], str]]:
    """Each flag in the sh blocks of a page, with its program."""
    found = []
    for info, text in blocks(page):
        if info.split()[:1] == ["sh"]:
            for words in commands(text):
                program = program_of(words)
                if program and not program[0].startswith("benchmarks/") and program[-1] != "pip":
                    found += [(program, word.split("=")[0]) for word in words if re.match(r"--\w", word)]
    return found


def test_each_page_has_a_chinese_twin():
    assert sorted(path.name for path in (ROOT / "docs" / "zh").glob("*.md")) == DOCS
    assert set(RUN_ORDER) <= set(DOCS)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_the_chinese_twin_has_the_same_outline_and_code(english, chinese):
    assert outline(chinese) == outline(english)
    assert [info for info, _ in blocks(chinese)] == [info for info, _ in blocks(english)]
    for (_, ours), (_, theirs) in zip(blocks(english), blocks(chinese), strict=True):
        assert without_comments(theirs) == without_comments(ours)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_files_that_are_named_exist(page):
    named = re.findall(r"`((?:sft|tests|docs|recipes|benchmarks|data_proj|suites|\.ci)/[\w./-]*)`", read(page))
    made = {"data_proj/opendata"}
    assert [path for path in named if not (ROOT / path).exists() and path not in made] == []


@pytest.mark.parametrize("page", PAGES)
def test_each_docs_page_is_in_the_table_of_the_readme(page):
    if page.startswith("docs/"):
        readme = "README.zh.md" if page.startswith("docs/zh/") else "README.md"
        assert f"({page})" in read(readme)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_flags_in_the_commands_exist(page):
    for program, flag in mentioned(page):
        assert flag in flags_of(program), (program, flag)


@pytest.mark.slow
def test_the_flags_named_in_the_text_exist():
    programs = {program for page in PAGES for program, _ in mentioned(page)} | {("-m", "sft.chat"), ("web_demo.py",)}
    flags = frozenset().union(*map(flags_of, programs))
    # The help of sft.opendata lists the rules without their --no_.
    known = flags | FOREIGN_FLAGS | {f"--no_{flag[2:]}" for flag in flags} | {"--no_", "--no_drop_"}
    for page in PAGES:
        named = re.findall(r"`(--[a-z][a-z0-9_]*)[^`]*`", FENCE.sub("", read(page)))
        assert [flag for flag in named if flag not in known] == [], page


def test_the_variables_before_a_launcher_are_its_knobs():
    knobs = "".join((ROOT / name).read_text(encoding="utf-8") for name in LAUNCHERS)
    knobs += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sft" / "launch").glob("*.py"))
    seen = set()
    for page in PAGES:
        for info, text in blocks(page):
            for words in commands(text) if info.startswith("sh") else ():
                if program_of(words) == TRAIN:
                    seen |= {word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
    assert {"MODEL", "ZERO", "NUM_GPUS", "HOSTFILE", "DRY_RUN", "PROBE_STEPS"} <= seen
    assert [name for name in sorted(seen) if not re.search(rf"\b{name}\b", knobs)] == []


def defaults_of_the_code() -> dict[str, str]:
    """The defaults that the pages quote, by knob or flag, read from the code that has them."""
    from dataclasses import asdict

    import train
    from sft.chat.sampling import Sampling
    from sft.launch import plan

    of_train = train.TrainingArguments.__dataclass_fields__
    knobs = {}
    for name in LAUNCHERS:
        text = (ROOT / name).read_text(encoding="utf-8")
        knobs |= dict(re.findall(r'"\$\{(\w+):=([\w/.-]+)\}"', text))  # the last one of a knob is that of every model
    return {
        **{name: knobs[name] for name in ("PYTHON", "DATA", "BATCH_SIZE", "ACCUMULATION", "DRY_RUN", "ZERO")},
        **{name: knobs[name] for name in ("OFFLOAD", "SEQUENCE_PARALLEL")},
        "MAX_LENGTH": str(train.DataArguments.max_length),
        "LEARNING_RATE": f"{of_train['learning_rate'].default:g}".replace("e-0", "e-"),
        "EPOCHS": f"{of_train['num_train_epochs'].default:g}",
        "GRACE": str(plan.GRACE_SECONDS),
        "NODE_TIMEOUT": str(plan.NODE_TIMEOUT_SECONDS),
        "MASTER_PORT": str(plan.DEFAULT_PORT),
        **{f"--{name}": str(value) for name, value in asdict(Sampling()).items() if name != "max_new_tokens"},
    }


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_the_defaults_in_the_tables_are_those_of_the_code(folder):
    rows = "".join(read(f"{folder}/{page}") for page in ("train.md", "multi-gpu.md", "chat.md"))
    for name, default in defaults_of_the_code().items():
        (shown,) = re.findall(rf"^\| `{name}` \|.*?([^|]+)\|$", rows, re.MULTILINE)
        assert re.search(rf"(?<![\w.]){re.escape(default)}(?![\w.])", shown), (name, default)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tracked files, and the environment of a shell in it."""
    folder = tmp_path_factory.mktemp("docs") / "clone"
    folder.mkdir()
    names = "".join(f"{name}\0" for name in tracked() if (ROOT / name).exists())
    subprocess.run(["cp", "-a", "--parents", *names.split("\0")[:-1], folder], cwd=ROOT, check=True)
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        script.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return folder, os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def test_all_pages_with_commands_to_run_are_run():
    assert {page for page in DOCS if any(info == "sh run" for info, _ in blocks(f"docs/{page}"))} == set(RUN_ORDER)


@pytest.mark.slow
def test_the_commands_marked_run_work_on_the_sample(clone):
    folder, environment = clone
    said = {}
    for page in RUN_ORDER:
        script = "set -e\n" + "".join(text for info, text in blocks(f"docs/{page}") if info == "sh run")
        done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[page] = done.stdout
    (shown,) = (text for info, text in blocks("docs/data.md") if not info)
    assert [line for line in shown.splitlines() if line != "…" and line not in said["data.md"]] == []
    assert "chat with it: python -m sft.chat --model_path runs/sample/model" in said["train.md"]
    assert "no problem found" in said["dry-run.md"]
    assert (folder / "runs/answers.jsonl").read_text(encoding="utf-8").count("\n") == 1
    assert {path.name for path in (folder / "out").iterdir()} == {"sample", "tokenizer"}
    assert (folder / "runs/quick/results.md").exists()
