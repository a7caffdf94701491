"""What stays of a run beside the model: run.json and the loss curve."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "datasets")


def provenance() -> dict:
    """Return the command, the versions and the git commit (None outside a checkout)."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"command": without_secrets([sys.executable, *sys.argv]), "versions": versions, "git_commit": _git_commit()}


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


def write_json(path: Path, value: dict) -> None:
    """Write JSON beside and move it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and held-out loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "held out", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)
