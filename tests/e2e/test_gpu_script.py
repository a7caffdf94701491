"""The GPU measurements run at toy size on a CPU, and their table and JSON hold every part."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

FOLDERS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]


@pytest.fixture
def scripts(monkeypatch):
    """Let the scripts of benchmarks/gpu be imported as they import each other."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    for name in ("run", "shapes", "records", "slim_wheel"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "TOY": "1"}
    done = subprocess.run(
        ["sh", "benchmarks/run_gpu.sh", "--minutes", "20"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert set(record["parts"]) == {"selftest", "steps", "exact", "loop", "memory", "lora", "replies", "moe"}
    exact = record["parts"]["exact"]["qwen2"]
    assert (exact["same_twice"], exact["same_resumed"]) == (True, True)
    assert record["parts"]["selftest"]["bloom"]["float32_gradients"] < 1e-6
    assert record["parts"]["selftest"]["bloom"]["fused_gradients"] < 0.01
    assert record["parts"]["steps"]["7B ours, 8 accumulated"]["graphs_after_warmup"] == 0
    assert "toy sizes" in record["machine"]
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {part} |" in table for part in record["parts"])


def test_a_process_that_fails_ends_the_measurements_with_its_output(scripts):
    import run

    with pytest.raises(run.Broken, match="ended with 0"):
        run.run("gpu/shapes.py")  # which reports nothing


def test_records_are_written_by_several_processes_at_a_time(scripts, tmp_path, monkeypatch):
    """A second writer begins and ends while the first is at its first record."""
    import records

    others = []

    def make_texts(num_records):
        if not others:
            others.append("begun")
            others[0] = records.write_records(num_records)
        yield from [("question", "answer")] * num_records

    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(records, "make_texts", make_texts)
    path = records.write_records(3)
    assert others == [path]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["0", "1", "2"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_utilisation_is_that_of_the_hand_count(scripts):
    """13 of 28 layers of the 7B shape: 3.57 billion parameters multiply a token."""
    import shapes

    config = shapes.config_of("qwen2.5-7b", toy=False)
    assert shapes.parameters_in_products("qwen2.5-7b", config) == 3_574_595_584
    assert shapes.mfu("qwen2.5-7b", config, 19_000, 0.0, 1.0) == pytest.approx(0.412, abs=5e-4)


def test_a_slimmed_wheel_keeps_one_library_and_a_record_of_what_is_left(scripts, tmp_path):
    from slim_wheel import slim

    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["__init__.py", "libbitsandbytes_cuda126.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_rocm70.so"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(f"bitsandbytes/{name}", name)
        file.writestr("b-1.dist-info/RECORD", "".join(f"bitsandbytes/{name},sha256=x,1\n" for name in names))
    slim(wheel, "130")
    with zipfile.ZipFile(wheel) as file:
        kept = ["bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cuda130.so"]
        assert file.namelist() == [*kept, "b-1.dist-info/RECORD"]
        assert file.read("b-1.dist-info/RECORD").decode() == "".join(f"{name},sha256=x,1\n" for name in kept)
        assert file.read(kept[1]).decode() == "libbitsandbytes_cuda130.so"
