"""The manifest of a checkpoint: size and sha256 of every file, written last; a folder without one is never resumed.

output_dir/checkpoint-20/           as transformers and DeepSpeed write it, and
    progress.json                   the position in the data, and the losses since the last log line
    fingerprint.json                what the run depends on
    manifest.json                   size and sha256 of every other file
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft.files import sync_file, sync_folder, write_json

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
PROGRESS = "progress.json"
# No file with such a suffix may be in a checkpoint without being in its manifest: libraries would load it.
LOADABLE_SUFFIXES = (".bin", ".json", ".pkl", ".pt", ".pth", ".py", ".safetensors")
MAX_HASH_THREADS = 16


def find_checkpoint(output_dir: str) -> tuple[str | None, list[str]]:
    """Return the newest checkpoint whose files equal its manifest, and a line for each newer one that was skipped."""
    skipped = []
    for folder in reversed(list_checkpoints(output_dir)):
        problem = find_damage(folder)
        if problem is None:
            return str(folder), skipped
        skipped.append(f"{folder}: skipped, {problem}")
    return None, skipped


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint holds optimizer states, of DeepSpeed or of torch; --save_only_model leaves them out."""
    return any(name.endswith(("optimizer.pt", "optim_states.pt")) for name in read_manifest(folder)["files"])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders named checkpoint-N, by N."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()]
    return sorted((folder for folder in folders if step_of(folder) is not None), key=step_of)


def step_of(folder: Path) -> int | None:
    """Return N of a folder named checkpoint-N, or None for any other name."""
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() and step != folder.name else None


def find_damage(folder: Path) -> str | None:
    """Return how a checkpoint differs from its manifest, or None; reads every byte of it."""
    problem = find_incomplete(folder)
    if problem:
        return problem
    files = read_manifest(folder)["files"]
    for name, found in hash_files(folder, files).items():
        if found != files[name]:
            return f"{name} differs from its checksum in {MANIFEST}"
    return None


def find_incomplete(folder: Path) -> str | None:
    """Return what a checkpoint lacks or has too much, or None; reads names and sizes only."""
    if not folder.exists():
        return "not there"
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if step_of(folder) not in (None, manifest["step"]):
        return f"its manifest is that of checkpoint-{manifest['step']}"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in LOADABLE_SUFFIXES}
    unknown = names - {MANIFEST} - manifest["files"].keys()
    if unknown:
        return f"{min(unknown)} is not in its manifest"
    for name, (size, _sha256) in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).is_symlink():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size:,} bytes, not {size:,}"
    return None


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a checkpoint; ValueError says what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was not saved to the end") from None
    except (OSError, ValueError):
        raise ValueError(f"{MANIFEST} is cut or can't be read") from None
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _compute_checksum(manifest):
        raise ValueError(f"{MANIFEST} differs from its own checksum")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
        raise ValueError(f"{MANIFEST} names files outside of the checkpoint")
    return manifest


def _compute_checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def is_of_run(folder: Path, run: str) -> bool:
    """Whether the run with this identity wrote the checkpoint."""
    try:
        return read_manifest(folder)["run"] == run
    except ValueError:
        return False


def checkpoint_bytes(folder: Path) -> int:
    """Return the size of all files that the manifest names; 0 without a manifest."""
    try:
        return sum(size for size, _sha256 in read_manifest(folder)["files"].values())
    except ValueError:
        return 0


def hash_files(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, list]:
    """Return [bytes, sha256] of each file, several at a time; `sync`: wait until they are on the disk."""

    def hash_file(name: str) -> list:
        if sync:
            sync_file(folder / name)
        with open(folder / name, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return [stream.tell(), digest]

    names = list(names)
    with ThreadPoolExecutor(max(2, min(MAX_HASH_THREADS, os.cpu_count() or 2))) as threads:
        return dict(zip(names, threads.map(hash_file, names), strict=True))


def write_manifest(folder: Path, files: dict[str, list], *, step: int, run: str) -> None:
    """Write the manifest, when all files are on the disk; then sync the folders' names."""
    manifest = {"step": step, "run": run, "saved": time.strftime("%F %T"), "files": files}
    write_json(folder / MANIFEST, {**manifest, "checksum": _compute_checksum(manifest)}, ensure_ascii=True)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
