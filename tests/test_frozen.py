"""Every input of a user keeps working: flags, exit codes, knobs, names in notebooks, run.json's keys, old checkpoints.

The files in tests/frozen/ were recorded at commit 37c5ef9. No test here imports a module of the project, so modules may
move. A change that is meant is recorded by editing those files, in the commit that makes it.

    flags.json       every flag of every command: default, choices, whether it is required, how many values it takes
    launches.json    what the scripts and recipes pass to train.py, by environment
    mistakes.json    mistaken commands, their exit code and how their one line on stderr begins
    names.json       public names of packages, with the names of their parameters
    run_keys.json    the keys of run.json
    run.tar.xz       base, data, checkpoint-2 of a run of four steps (fp32, one thread), and the final weights
"""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

FROZEN = ROOT / "tests" / "frozen"
TRAIN = str(ROOT / "train.py")
COMMANDS = {
    "train.py": [TRAIN],
    "web_demo.py": [str(ROOT / "web_demo.py")],
    "sft.checkpoint consolidate": ["-m", "sft.checkpoint", "consolidate"],
    **{
        f"sft.{name}": ["-m", f"sft.{name}"]
        for name in ("opendata", "chat", "checkpoint", "evaluate", "export", "tiny")
    },
}
# Of commands whose parser leaves the defaults to a function: its package and name.
FUNCTIONS = {"sft.opendata": "sft.opendata build_opendata", "sft.tiny": "sft.tiny build_tiny"}


def read(name: str):
    return json.loads((FROZEN / name).read_text(encoding="utf-8"))


def environment(**settings: str) -> dict[str, str]:
    """Return an environment without knobs of the scripts, in which commands start from any folder."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | settings


def unpack(folder: Path) -> Path:
    with tarfile.open(FROZEN / "run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def execute(command: list[str], folder: Path, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_of(tmp_path_factory) -> Callable[[str], tuple[subprocess.CompletedProcess, dict]]:
    """Return a function that gives how a command's --help ended and the flags of its parser; each is started once."""
    folder = tmp_path_factory.mktemp("help")

    @cache
    def ask(name: str):
        dump = folder / f"{name}.json"
        path = f"{FROZEN}{os.pathsep}{ROOT}"  # with sitecustomize.py, which Python imports at its start
        knobs = {"DUMP_FLAGS": str(dump), "PYTHONPATH": path, "DEFAULTS_OF": FUNCTIONS.get(name, "")}
        done = execute([sys.executable, *COMMANDS[name], "--help"], folder, **knobs)
        return done, json.loads(dump.read_text()) if dump.exists() else {}

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_to_stdout_and_exits_with_0(help_of, command):
    done, _flags = help_of(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_still_there_with_the_same_default(help_of, command):
    _done, now = help_of(command)
    for name, frozen in read("flags.json")[command].items():
        assert name in now, name
        for part in frozen.keys() - {"default", "choices"}:
            assert now[name][part] == frozen[part], (name, part)
        assert set(frozen.get("choices", ())) <= set(now[name].get("choices", ())), name
        if "default" in frozen:  # transformers' own flags have no frozen default
            assert "choices" in frozen or "choices" not in now[name], f"{name} took any value"
            assert now[name]["default"] == frozen["default"], name


# --- exit codes ---------------------------------------------------------------------------------------------------


MISTAKES = read("mistakes.json")


def command_of(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and its knobs; NAME=value words with a name in capitals are knobs."""
    knobs = dict(word.split("=", 1) for word in words[1:] if word.split("=")[0].isupper() and "=" in word)
    first, *rest = [word for word in words if word.split("=")[0] not in knobs]
    if first.endswith(".sh"):
        return ["sh", str(ROOT / first), *rest], knobs
    return [sys.executable, *([str(ROOT / first)] if first.endswith(".py") else ["-m", first]), *rest], knobs


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """Return how each command of mistakes.json ended; none of them writes where another reads."""
    folder = unpack(tmp_path_factory.mktemp("mistakes"))
    (folder / "bad.json").write_text('{"cut\n')

    def make(mistake: dict) -> subprocess.CompletedProcess:
        command, knobs = command_of(mistake["words"])
        return execute(command, folder, PYTHON=sys.executable, **knobs)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return {case["name"]: done for case, done in zip(MISTAKES, threads.map(make, MISTAKES), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake["name"])
def test_a_mistake_gives_one_line_and_the_same_exit_code(mistakes, mistake):
    done, line = mistakes[mistake["name"]], mistake["line"]
    assert done.returncode == mistake["exit_code"], done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    if "error: " in line:  # argparse's own; the usage goes before it
        assert lines[0].startswith("usage: ")
        assert line in lines[-1]
        assert not [other for other in lines[1:-1] if not other.startswith(" ")]
    else:
        assert len(lines) == bool(line), done.stderr
        assert done.stderr.startswith(line)


# --- knobs of the scripts -----------------------------------------------------------------------------------------


RECORDER = """#!/bin/sh
case "$*" in "-m sft.launch --processes") echo "${NUM_GPUS:-8}"; exit ;; esac
for word; do printf '%s\\n' "$word"; done >> "$RECORD"
echo >> "$RECORD"
"""


def launch(case: dict, folder: Path) -> list[list[str]]:
    """Run a script with an interpreter that only records its arguments; return those of each call."""
    python, record = folder / "python", folder / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)
    settings = {"OUTPUT": "runs/frozen", "PYTHON": str(python), "RECORD": str(record)}
    knobs = {name: value.replace("PYTHON", str(python)) for name, value in case["environment"].items()}
    done = execute(["sh", str(ROOT / case["script"]), *case["arguments"]], folder, **(settings | knobs))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [call.split("\n") for call in record.read_text().strip("\n").split("\n\n")]


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each flag of a command line, the last ones where a flag is repeated."""
    flags, last = {}, []
    for word in words:
        if word.startswith("--"):
            last = flags[word] = []
        else:
            last.append(word)
    return flags


def as_written(value) -> object:
    """Return a value as a number where it is one, so that 1e-5 equals 0.00001."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.slow
@pytest.mark.parametrize("case", read("launches.json"), ids=lambda case: case["name"])
def test_a_knob_reaches_train_py(case, help_of, tmp_path):
    """A flag may also be left out where train.py's own default is the same."""
    *before, training = launch(case, tmp_path)
    assert [" ".join(call) for call in before] == case["before"]
    passed, defaults = flags_of(training), help_of("train.py")[1]
    assert training[: len(case["command"])] == case["command"]
    for flag, values in case["flags"].items():
        now = passed[flag] if flag in passed else [defaults[flag]["default"]]
        assert [as_written(value) for value in now] == [as_written(value) for value in values], flag
    assert passed.keys() <= case["flags"].keys()


def test_every_knob_of_a_script_is_tried():
    tried = {}
    for case in read("launches.json"):
        tried.setdefault(case["script"], set()).update(case["environment"])
    common = {"MODEL", "DATA", "EPOCHS", "LEARNING_RATE", "MAX_LENGTH", "BATCH_SIZE", "ACCUMULATION"}
    common |= {"DRY_RUN", "PROBE_STEPS"}
    assert tried["base_run.sh"] >= common | {"OUTPUT", "LAUNCHER", "NUM_PROCESSES"}
    assert tried["ds_all.sh"] >= common | {"OUTPUT", "ZERO", "OFFLOAD", "NUM_GPUS", "SLURM_JOB_ID"}
    assert "REPLAY" in tried["recipes/blossom-v5-stage2.sh"]
    recipes = ["bloom", "blossom-v5-stage1", "blossom-v5-stage2", "falcon", "mistral", "qwen", "yi"]
    assert tried.keys() == {"base_run.sh", "ds_all.sh", *(f"recipes/{name}.sh" for name in recipes)}


# --- names that notebooks import ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["infer.ipynb", "data_proj/process_data.ipynb"])
def test_every_import_of_a_notebook_resolves(name, tmp_path):
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    trees = [ast.parse("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [ast.unparse(node) for node in nodes]
    assert any(line.startswith("from sft.") for line in lines)
    done = execute([sys.executable, "-c", "\n".join(lines)], tmp_path)
    assert done.returncode == 0, done.stderr


PRINT_PARAMETERS = """
import importlib, inspect, json, sys
found = {}
for package, names in json.load(sys.stdin).items():
    for name in names:
        value = importlib.import_module(package)
        for part in name.split("."):
            value = getattr(value, part)
        found[f"{package} {name}"] = list(inspect.signature(value).parameters) if callable(value) else None
print(json.dumps(found))
"""


def test_public_names_stay_importable_with_their_parameters(tmp_path):
    frozen = read("names.json")
    done = subprocess.run(
        [sys.executable, "-c", PRINT_PARAMETERS],
        input=json.dumps(frozen),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    now = json.loads(done.stdout)
    for package, names in frozen.items():
        for name, parameters in names.items():
            assert set(parameters or ()) <= set(now[f"{package} {name}"] or ()), name


# --- a run of 37c5ef9 ---------------------------------------------------------------------------------------------


LOSSES = {1: 5.727963447570801, 2: 5.717719078063965, 3: 5.523553848266602, 4: 5.385339260101318}
EVAL_LOSSES = {2: 5.520676535529059, 4: 5.325403973862931}
# On the same kind of CPU they are equal to the last bit. With other vector instructions (ATEN_CPU_CAPABILITY=default)
# the losses differed by 5e-7, the weights by 1e-8; another seed moved the losses by 0.16, the weights by 0.04.
LOSS_TOLERANCE = 5e-6
WEIGHT_TOLERANCE = 1e-6


def training(*flags: str, steps: int = 4) -> list[str]:
    """Return the command of the recorded run; the checkpoint's fingerprint holds these flags."""
    settings = f"""
        --model_name_or_path base --data_path data --output_dir run --cache_dir cache --use_cpu --chat_format chatml
        --max_length 96 --max_steps {steps} --save_steps 2 --logging_steps 1 --eval_strategy steps --eval_steps 2
        --per_device_train_batch_size 1 --gradient_accumulation_steps 3 --learning_rate 1e-2 --max_new_tokens 4
        --num_reply_prompts 2"""
    return [sys.executable, TRAIN, *settings.split(), *flags]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, str]:
    """Resume from the recorded checkpoint-2; return the folder and what was printed."""
    folder = unpack(tmp_path_factory.mktemp("resumed"))
    done = execute(training("--eval_quick", "--resume_from_checkpoint", "auto"), folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_checkpoint_of_37c5ef9_resumes_to_the_same_losses_and_weights(resumed):
    folder, printed = resumed
    assert "resuming from run/checkpoint-2\n" in printed
    history = json.loads((folder / "run" / "run.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert losses == pytest.approx(LOSSES, rel=0, abs=LOSS_TOLERANCE)
    assert (losses[1], losses[2]) == (LOSSES[1], LOSSES[2])  # these two come out of the checkpoint
    eval_losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert eval_losses == pytest.approx(EVAL_LOSSES, rel=0, abs=LOSS_TOLERANCE)
    ours, frozen = load_file(folder / "run" / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert ours.keys() == frozen.keys()
    for name, weight in frozen.items():
        assert (ours[name] - weight).abs().max().item() <= WEIGHT_TOLERANCE, name


def keys_of(value, path: str = "") -> set[str]:
    """Return the paths of all values, as in data.train.* (a file's name becomes *), without what a question checks."""
    if isinstance(value, list):
        return set().union({path}, *(keys_of(entry, f"{path}[]") for entry in value))
    if not isinstance(value, dict) or path.endswith(".check"):
        return {path}
    names = {key: "*" if key.endswith(".json") else key for key in value}
    return set().union(*(keys_of(value[key], f"{path}.{name}".lstrip(".")) for key, name in names.items()))


@pytest.mark.slow
def test_run_json_has_all_keys_that_it_had(resumed):
    folder, _printed = resumed
    record = json.loads((folder / "run" / "run.json").read_text())
    assert set(read("run_keys.json")) - keys_of(record) == set()


def wait_for_first_loss(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if "'loss'" in line:
            return
    raise AssertionError(f"ended with {process.wait()} before its first step")


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_a_checkpoint_and_exits_with_75(tmp_path):
    with subprocess.Popen(
        training("--resume_from_checkpoint", "auto", "--allow_changed", "max_steps", steps=10**6),
        cwd=unpack(tmp_path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_for_first_loss(process)
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
    assert process.returncode == 75, printed
    assert "continue with: cd " in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_rank_whose_partner_was_killed_exits_with_76(tmp_path):
    unpack(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in ("0", "1"):
        knobs = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        knobs |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = training("--output_dir", "new", "--eval_strategy", "no", steps=10**6)
        ranks.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment(**knobs),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        wait_for_first_loss(ranks[0])
        ranks[1].kill()
        ranks[1].wait()
        _printed, errors = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 76, errors
    assert "rank 1" in errors
