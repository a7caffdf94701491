"""`pip install .`: its files, its commands from any folder, and version ranges that hold the tested lock."""

import os
import re
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.test_layout import tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = ("opendata", "chat", "evaluate", "export", "checkpoint", "tiny")


def test_the_locked_versions_are_in_the_ranges():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))
    ranges = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"]]
    wanted = {requirement.name: requirement.specifier for requirement in map(Requirement, ranges)}
    assert set(wanted) == set(locked)
    assert {name: version for name, version in locked.items() if version not in wanted[name]} == {}


def test_the_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert PROJECT["license"] in citation
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n")[0].strip() == "Apache License"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    names = [name for name in tracked() if (ROOT / name).exists()]
    (folder / "source").mkdir()
    subprocess.run(["cp", "-a", "--parents", *names, folder / "source"], cwd=ROOT, check=True)
    pip(sys.executable, "wheel", "--no-build-isolation", "-w", str(folder), str(folder / "source"))
    (found,) = folder.glob("chat_sft-*.whl")
    return found


def pip(python: str | Path, command: str, *arguments: str) -> None:
    line = [sys.executable, "-m", "pip", "--python", str(python), command, "--no-deps", "--no-index", "-q", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Return a function that runs a command of an environment with the wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    pip(python, "install", str(wheel))
    # The dependencies are those of the environment that the tests run in.
    (packages / "tests.pth").write_text("\n".join([*site.getsitepackages(), *_paths_of_pth_files()]) + "\n")
    (folder / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "JUDGE_API_KEY": "unused"}

    def run_in(command: str, *arguments: str) -> str:
        line = [str(python.with_name(command)), *arguments]
        done = subprocess.run(line, cwd=folder / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    assert run_in("python", "-c", "import sft; print(sft.__file__)").strip() == str(packages / "sft" / "__init__.py")
    return run_in


def _paths_of_pth_files() -> list[str]:
    """Folders that .pth files of this environment added to sys.path: only the first level of them is followed."""
    known = {str(ROOT), *site.getsitepackages()}
    return [path for path in sys.path if path.endswith("site-packages") and path not in known]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    wanted = {name for name in tracked() if name.startswith("sft/") and not (ROOT / name).is_symlink()}
    wanted |= {f"sft/sample/{path.name}" for path in (ROOT / "data_proj" / "sample").iterdir()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sft/")}
    assert held == wanted


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_the_console_commands_say_how_to_use_them(run, command):
    assert run(command, "--help").startswith("usage: ")


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_modules_run_from_any_folder(run, module):
    assert run("python", "-m", f"sft.{module}", "--help").startswith("usage: ")


@pytest.mark.slow
def test_data_evaluation_and_export_work_from_any_folder(run):
    sample = str(ROOT / "data_proj" / "sample")
    assert "\ntotal " in run("sft-opendata", sample, "--output", "opendata")
    run("python", "-m", "sft.tiny", "--family", "qwen2", "--output_dir", "base")
    asked = ("--limit", "2", "--max_new_tokens", "4", "--eval_data_path", "opendata/eval.json")
    quick = run("sft-evaluate", "--suite", "quick", "--model_path", "base", "--output_dir", "quick", *asked)
    assert "# Quick check of base" in quick and "written to quick/results.md" in quick
    judge = ("--judge_base_url", "http://127.0.0.1:9/v1", "--judge_model", "judge")
    line = ("sft-evaluate", "--suite", "mt-bench", "--model_path", "base", *judge, "--output_dir", "mt", "--dry_run")
    assert "160 requests to send" in run(*line)
    run("sft-export", "--model_path", "base", "--to", "merged", "--output_dir", "merged")
    assert run("sft-chat", "--model_path", "merged", "--message", "你好", "--max_new_tokens", "4")
