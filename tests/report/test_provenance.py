"""The record of how a run was started."""

import torch

from sft.report.provenance import provenance


def test_the_provenance_names_the_command_and_the_versions():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"][0].endswith(("python", "python3", "python3.11", "python3.12"))
    assert found["git_commit"] is None or len(found["git_commit"]) == 40
