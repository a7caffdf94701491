"""The steps of the Dockerfile, the workflow and .ci/run, with commands that only write down how they were called."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture
def install(tmp_path):
    """Return a function that runs .ci/install on a machine with these commands, and gives the calls in their order."""

    def run(*commands: str, headers: bool, arguments: tuple[str, ...] = ()) -> list[str]:
        machine = tmp_path / "bin"
        shutil.rmtree(machine, ignore_errors=True)
        machine.mkdir()
        for name in ("dirname", "mkdir", "cp"):
            (machine / name).symlink_to(shutil.which(name))
        log, pip = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        write_down = f'echo "${{0##*/}} $*" >> {log}\n'
        venv = f"case $2 in venv) mkdir -p $3/bin; cp {pip} $3/bin/python;; esac\n"
        known = f"case $1 in -c) exit {0 if headers else 1};; esac\n"
        for path in (*map(machine.joinpath, ("apt-get", *commands)), pip):
            path.write_text(f"#!/bin/sh\n{write_down}")
        (machine / "python3").write_text(f"#!/bin/sh\n{known}{write_down}{venv}")
        for path in (machine / "apt-get", machine / "python3", *map(machine.joinpath, commands), pip):
            path.chmod(0o755)
        environment = {"PATH": str(machine), "VENV": str(tmp_path / "venv")}
        shell = shutil.which("sh")
        command = [shell, ROOT / ".ci" / "install", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return log.read_text().replace(str(tmp_path), "…").splitlines()

    return run


def test_an_empty_machine_gets_its_packages_first(install):
    assert install(headers=False) == [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends g++ git python3 python3-dev python3-venv",
        "python3 -m venv …/venv",
        "python -m pip install -q -r requirements.txt",
    ]


def test_a_machine_that_has_them_needs_no_root(install):
    assert install("g++", "git", headers=True) == [
        "python3 -m venv …/venv",
        "python -m pip install -q -r requirements.txt",
    ]
    # The environment is used again.
    assert install("g++", "git", headers=True) == ["python -m pip install -q -r requirements.txt"]


def test_the_system_packages_alone_make_no_environment(install):
    assert install("git", headers=True, arguments=("system",)) == [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends g++",
    ]


def test_the_dockerfile_runs_the_script_that_ci_runs():
    runs = re.findall(r"^RUN (.*)$", DOCKERFILE, re.MULTILINE)
    assert [line.split(" && ")[0] for line in runs] == ["sh .ci/install", "pip install -q --no-deps --editable ."]
    assert "\nsh .ci/install\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert copied == [".ci/install", "requirements.txt requirements-gpu.txt", "."]
    command = re.search(r'^CMD \["sh", "(\S+)"\]$', DOCKERFILE, re.MULTILINE)[1]
    assert (ROOT / command).is_file()


def test_the_workflow_calls_the_script():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == "sh .ci/run"
