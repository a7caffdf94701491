"""The shell scripts, started as people start them."""

import os
import subprocess
import sys

from tests.conftest import ROOT

KNOBS = ("MODEL", "DATA", "OUTPUT", "ZERO", "OFFLOAD", "NUM_GPUS", "NUM_PROCESSES", "HOSTFILE", "NNODES")
KNOBS += ("DRY_RUN", "PROBE_STEPS", "MASTER_PORT", "SLURM_JOB_ID")


def sh(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project under dash, with these knobs alone; return its exit code and output."""
    clean = {name: value for name, value in os.environ.items() if name not in KNOBS}
    settings = {**clean, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["dash", script, *flags]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=600)
