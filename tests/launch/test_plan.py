"""The plan of a job: from variables of the environment, a hostfile, or Slurm."""

from types import SimpleNamespace

import pytest

from sft.launch import plan
from sft.launch.plan import Job, find_first_host, plan_job

SEVERAL = {"MODEL": "m", "OUTPUT": "o", "NUM_GPUS": "4"}
SLURM = {**SEVERAL, "SLURM_NNODES": "3", "SLURM_JOB_ID": "123456", "SLURM_NODEID": "2"}


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    monkeypatch.setattr(plan, "count_gpus", lambda: 8)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, Job((8,))),
        ({"NUM_GPUS": "4", "MASTER_PORT": "1234"}, Job((4,), port=1234)),
        ({"SLURM_NNODES": "1", "SLURM_JOB_ID": "5"}, Job((8,))),
        ({**SEVERAL, "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, Job((4, 4), 1, "a", 29500)),
        ({**SLURM, "SLURM_JOB_NODELIST": "gpu[07-08,12]"}, Job((4, 4, 4), 2, "gpu07", 23456)),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "b,c", "SLURM_NODEID": "0"},
            Job((4, 4), 0, "b", 23456),
        ),
        ({**SLURM, "SLURM_JOB_NODELIST": "a", "NNODES": "1"}, Job((4,))),
    ],
)
def test_the_environment_gives_processes_machine_and_address(environment, job):
    assert plan_job(environment) == job


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"NUM_GPUS": "0"}, "NUM_GPUS=0: use a whole number, 1 or more"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS=two: use a whole number, 1 or more"),
        ({"NUM_GPUS": "9"}, "NUM_GPUS=9: this machine has 8"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: use a whole number, 0 to 65535"),
        ({"GRACE": "-1"}, "GRACE=-1: use a whole number, 0 or more"),
        ({"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere: no such file; a line for each machine: name slots=8"),
        ({"NNODES": "2", "MODEL": "m"}, "several machines: name OUTPUT, one folder that all of them see"),
        ({"NNODES": "2"}, "several machines: name MODEL; the embedded default is for one"),
        (
            {**SEVERAL, "NNODES": "2"},
            "NNODES: give NODE_RANK (0 to NNODES-1) and MASTER_ADDR, the name of the machine of rank 0",
        ),
        (
            {**SEVERAL, "NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK=2: use a whole number, 0 to 1",
        ),
        (
            {**SLURM, "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "a"},
            "Slurm started several tasks on this machine; one is enough: --ntasks-per-node=1",
        ),
        (SLURM, "SLURM_NNODES=3 without SLURM_JOB_NODELIST and SLURM_NODEID: start with srun sh ds_all.sh"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_variable(environment, problem):
    with pytest.raises(ValueError) as error:
        plan_job(environment)
    assert str(error.value) == problem


def test_without_gpus_there_are_two_processes_or_NUM_GPUS(monkeypatch):
    monkeypatch.setattr(plan, "count_gpus", lambda: 0)
    assert plan_job({}) == Job((2,))
    assert plan_job({"NUM_GPUS": "5"}) == Job((5,))


def test_a_hostfile_names_machines_and_their_slots(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# rack 1\nnode1 slots=8\n\nnode2 slots=4  # half of it\n")
    environment = {"HOSTFILE": str(hosts), "MODEL": "m"}
    assert plan_job(environment) == Job((8, 4), 0, "node1", 0, ("node1", "node2"))
    with pytest.raises(ValueError, match="HOSTFILE and NUM_GPUS: give one of them"):
        plan_job({**environment, "NUM_GPUS": "2"})
    for text, place in (("node1\n", 1), ("a slots=1\na slots=2\n", 2), ("a slots=0\n", 1), ("-oProxy slots=1\n", 1)):
        hosts.write_text(text)
        with pytest.raises(ValueError, match=f"hosts line {place}: .* write each machine once, as: name slots=8"):
            plan_job(environment)
    hosts.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no machine"):
        plan_job(environment)
    hosts.write_text("localhost slots=1\nb slots=1\n")
    with pytest.raises(ValueError, match="can't reach a machine named localhost"):
        plan_job(environment)


def test_the_first_machine_of_slurms_list_is_found():
    assert find_first_host("node[07-09,12],login") == "node07"
    assert find_first_host("a,b") == "a"
    assert find_first_host("rack[2-3]n[1,4]") == "rack2n1"


def test_torch_is_asked_for_gpus_only_where_there_is_a_device_file(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(plan.Path, "glob", lambda folder, name: iter([folder / "nvidia0"] * (name == "nvidia*")))
    monkeypatch.setattr(plan.subprocess, "run", lambda *_arguments, **_options: SimpleNamespace(stdout=b"3\n"))
    assert plan.count_gpus() == 3
    monkeypatch.setattr(plan.Path, "glob", lambda _folder, _name: iter(()))
    assert plan.count_gpus() == 0
