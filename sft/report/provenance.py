"""Provenance of a run: its command without secrets, versions, the git commit."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "datasets")


def provenance() -> dict:
    """Return the command, the versions and the git commit (None outside a checkout)."""
    command = without_secrets([sys.executable, *sys.argv])
    return {"command": command, "versions": package_versions(), "git_commit": _git_commit()}


def package_versions() -> dict[str, str | None]:
    """Return the version of Python and of each of PACKAGES, None where it is not installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def without_secrets(command: list[str]) -> list[str]:
    """Return a command line with the values of token flags left out."""
    shown = []
    for word in command:
        secret = bool(shown) and re.fullmatch(r"--\w*token", shown[-1])
        shown.append("***" if secret else re.sub(r"^(--\w*token)=.*", r"\1=***", word))
    return shown


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
