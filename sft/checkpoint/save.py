"""Checkpoints: sealed so that a broken one is never continued from; which one to continue from; the final model.

output_dir/checkpoint-20/           as transformers and DeepSpeed write it, and
    progress.json                   where the data stands, and the logs that are not out yet
    fingerprint.json                what the run depends on
    manifest.json                   size and sha256 of every other file; written last
output_dir/.saving/                 a checkpoint or model on its way; moved into place when it is whole

python -m sft.checkpoint consolidate runs/my_run/model --output rebuilt     a model from the newest ZeRO checkpoint
"""

import argparse
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft.checkpoint import zero
from sft.files import MAX_SHARD_SIZE
from sft.launch.processes import LOCK, RANKS, write_whole

MANIFEST, FINGERPRINT, PROGRESS, SAVING, MARKER = (
    "manifest.json",
    "fingerprint.json",
    "progress.json",
    ".saving",
    "run.json",
)
LOADABLE = (".bin", ".json", ".pkl", ".pt", ".pth", ".py", ".safetensors")  # nothing of these may slip in unsealed
PAGE = "report.html"  # all that a run leaves which ends before its first checkpoint; written anew at every start
UNUSED = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")  # pickled arguments; scripts that load pickles


def check_output_dir(output_dir: str, *, resume: bool) -> str | None:
    """Return why `output_dir` can't be written to, or None. A folder with something in it is only for resuming."""
    folder = Path(output_dir).expanduser()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"--output_dir {output_dir}: {existing} can't be written to"
    if not resume and folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK, RANKS, SAVING, PAGE}:
        return (
            f"--output_dir {output_dir}: is not empty, and nothing in it will be overwritten; name a new folder, or "
            "continue the run in it with --resume_from_checkpoint auto"
        )
    return None


# --- which one to continue from -----------------------------------------------------------------------------------


def find_checkpoint(output_dir: str) -> tuple[str | None, list[str]]:
    """Return the newest sealed checkpoint whose files are what was sealed, and a line for each newer one skipped."""
    skipped = []
    for folder in reversed(_numbered(output_dir)):
        problem = unsealed(folder)
        if problem is None:
            return str(folder), skipped
        skipped.append(f"{folder}: skipped, {problem}")
    return None, skipped


def _numbered(output_dir: str | Path) -> list[Path]:
    """The folders named checkpoint-N, by N."""
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()]
    found = [(folder.name.removeprefix("checkpoint-"), folder) for folder in found]
    return [folder for step, folder in sorted((int(step), folder) for step, folder in found if step.isdecimal())]


def unsealed(folder: Path) -> str | None:
    """Return why a checkpoint is not what a run sealed, or None; reads every byte of it."""
    problem = incomplete(folder)
    if problem:
        return problem
    files = read_manifest(folder)["files"]
    for name, found in hash_files(folder, files).items():
        if found != files[name]:
            return f"{name} has other bytes than were sealed"
    return None


def incomplete(folder: Path) -> str | None:
    """Return what a checkpoint lacks, or None; looks at names and sizes alone."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.name != f"checkpoint-{manifest['step']}":
        return f"its manifest is that of checkpoint-{manifest['step']}"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in LOADABLE}
    if names - {MANIFEST} - manifest["files"].keys():
        return f"{min(names - {MANIFEST} - manifest['files'].keys())} is not in its manifest"
    for name, (size, _sha256) in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).is_symlink():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size:,} bytes, not {size:,}"
    return None


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a sealed checkpoint; ValueError says what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was not saved to the end") from None
    except (OSError, ValueError):
        raise ValueError(f"{MANIFEST} is cut or can't be read") from None
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
        raise ValueError(f"{MANIFEST} has other bytes than were sealed")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
        raise ValueError(f"{MANIFEST} names files outside of the checkpoint")
    return manifest


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def hash_files(folder: Path, names: Iterable[str], *, to_disk: bool = False) -> dict[str, list]:
    """Return [bytes, sha256] of each file, several at a time; `to_disk` waits until they are on the disk."""

    def one(name: str) -> list:
        with open(folder / name, "rb") as stream:
            if to_disk:
                os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return [stream.tell(), digest]

    names = list(names)
    with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as threads:
        return dict(zip(names, threads.map(one, names), strict=True))


# --- saving one ---------------------------------------------------------------------------------------------------


def open_staging(output_dir: Path, run: str) -> Path:
    """Return the folder in which things are written before they are moved into place, empty, with our mark in it."""
    clear_leftovers(output_dir)
    folder = output_dir / SAVING
    folder.mkdir(exist_ok=True)
    write_whole(folder / MARKER, {"run": run})
    return folder


def clear_leftovers(output_dir: Path) -> list[str]:
    """Remove what a killed save of ours left, and say so; ValueError when `.saving` does not carry our mark."""
    folder, said = output_dir / SAVING, []
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ValueError(f"{folder}: this is not of a run of ours; move it away")
        said = [f"{path}: skipped and removed, its save was cut off" for path in folder.iterdir() if path.is_dir()]
        shutil.rmtree(folder)
    for path in output_dir.glob(".removed-*"):
        _delete(path)
    return said


def list_files(folder: Path) -> list[str]:
    """All files in a checkpoint but its manifest, sorted; what is never read again is removed first."""
    for name in UNUSED:
        (folder / name).unlink(missing_ok=True)
    paths = [path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != MANIFEST)


def seal(folder: Path, files: dict[str, list], *, step: int, run: str) -> None:
    """Write the manifest, when all files are on the disk; then the folder's names themselves."""
    manifest = {"step": step, "run": run, "sealed": time.strftime("%F %T"), "files": files}
    write_whole(folder / MANIFEST, {**manifest, "checksum": _checksum(manifest)})
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(staged: Path, final: Path, run: str) -> str | None:
    """Move a sealed checkpoint to its name; what was there is set aside, and goes if it was this run's own.

    Returns a line when something stays aside.
    """
    if not final.exists():
        os.rename(staged, final)
        _sync_folder(final.parent)
        return None
    _exchange(staged, final)
    _sync_folder(final.parent)
    if _is_of(staged, run):
        _delete(staged)
    if not staged.exists():
        return None
    aside = next(path for k in range(1, 10**6) if not (path := Path(f"{final}.set-aside-{k}")).exists())
    os.rename(staged, aside)
    return f"{aside}: was {final.name}, with files that this run did not write; it is kept under this name"


def _exchange(left: Path, right: Path) -> None:
    """Swap two names in one step (Linux's renameat2), so that neither is ever missing; else in three."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(-100, os.fsencode(left), -100, os.fsencode(right), 2) == 0:
        return
    between = right.with_name(f".exchange-{right.name}")
    os.rename(right, between)
    os.rename(left, right)
    os.rename(between, left)


def _is_of(folder: Path, run: str) -> bool:
    try:
        return read_manifest(folder)["run"] == run
    except ValueError:
        return False


def rotate(output_dir: Path, *, keep: int | None, step: int, run: str, spare: str | None = None) -> None:
    """Remove this run's sealed checkpoints up to `step` but the newest `keep`, and only files their manifests name."""
    ours = [folder for folder in _numbered(output_dir) if _is_of(folder, run)]
    ours = [folder for folder in ours if int(folder.name.removeprefix("checkpoint-")) <= step]
    for folder in ours[: -max(1, keep)] if keep else []:
        if str(folder) != spare:
            removed = folder.with_name(f".removed-{folder.name}")
            os.rename(folder, removed)
            _delete(removed)


def _delete(folder: Path) -> None:
    """Delete what the folder's manifest names, the manifest last; what else is in it stays, under its old name."""
    try:
        names = read_manifest(folder)["files"]
    except ValueError:
        return
    for name in [*names, MANIFEST]:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()
    elif folder.name.startswith(".removed-"):
        os.rename(folder, folder.with_name(folder.name.removeprefix(".removed-")))


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise ValueError when the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        disk = next(path for path in (folder.resolve(), *folder.resolve().parents) if os.path.ismount(path))
        raise ValueError(
            f"{folder}: the disk at {disk} has {free:,} bytes free, and {what} needs {needed:,}; nothing was removed. "
            "Make room, then continue with --resume_from_checkpoint auto"
        )


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of a save says that a disk or quota is full; torch and safetensors say it in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    said = r"No space left|inline_container|PytorchStreamWriter failed|File too large|os error 28"
    return bool(re.search(said, str(error)))


def size_of(folder: Path) -> int:
    """Bytes of all files of a sealed checkpoint, as its manifest has them; 0 without one."""
    try:
        return sum(size for size, _sha256 in read_manifest(folder)["files"].values())
    except ValueError:
        return 0


# --- what a run depends on ----------------------------------------------------------------------------------------


def fingerprint(flags: dict, *, versions: dict, **exact) -> dict:
    """Return what a run depends on: `flags` and `exact`, and the versions, which are only told when they change."""
    flags = {name: getattr(value, "value", value) for name, value in flags.items()}
    if flags.get("max_steps", 0) > 0:
        flags["num_train_epochs"] = None  # not looked at then
    return json.loads(json.dumps({"exact": {**flags, **exact}, "told": versions}))


def compare(old: dict, new: dict, allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compare two fingerprints; return what refuses a resume, and what is only said, a line each.

    A fingerprint is {"exact": {field: value}, "told": {field: value}}: a change in the first needs to be `allowed`.
    """
    fields = old["exact"].keys() | new["exact"].keys()
    if set(allowed) - fields:
        return [
            f"--allow_changed {min(set(allowed) - fields)}: no such field; there are {', '.join(sorted(fields))}"
        ], []
    refused, said = [], []
    for field in sorted(fields):
        before, now = old["exact"].get(field), new["exact"].get(field)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            before, now = ({key: value.get(key) for key in keys} for value in (before, now))
        change = f"{field} was {_brief(before)} and is {_brief(now)}"
        if field in allowed:
            said.append(f"allowed: {change}; from here on the run is not bit-identical to one that never stopped")
        else:
            refused.append(f"{change}; give the old one again, or add --allow_changed {field}")
    for field in sorted(old["told"].keys() | new["told"].keys()):
        if old["told"].get(field) != new["told"].get(field):
            before, now = _brief(old["told"].get(field)), _brief(new["told"].get(field))
            said.append(f"{field} was {before} and is {now}; results may differ in the last bits")
    return refused, said


def check_unchanged(checkpoint: str | None, new: dict, allow_changed: str | None, say: Callable) -> list[str]:
    """Compare with what a checkpoint was made of, say what differs, return the fields; ValueError if not allowed."""
    if checkpoint is None:
        return []
    old = json.loads((Path(checkpoint) / FINGERPRINT).read_text(encoding="utf-8"))
    allowed = [name.strip() for name in (allow_changed or "").split(",") if name.strip()]
    sizes = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    rows, rows_then = (math.prod(of["exact"][name] for name in sizes) for of in (new, old))
    if "world_size" in allowed and rows == rows_then:  # as the launchers do it: other shares of the same update
        allowed = [*allowed, *sizes[1:]]
    refused, said = compare(old, new, allowed)
    if refused:
        raise ValueError("\n".join(f"{checkpoint}: {line}" for line in refused))
    for line in said:
        say(line)
    return [name for name in allowed if old["exact"].get(name) != new["exact"].get(name)]


def _brief(value) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 300 else text[:300] + "..."


def hash_base(path: str) -> str | None:
    """A hash of a local base: its config, its weights' headers, and samples of their bytes; None for a hub model."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as stream:
                for place in range(0, size, max(1 << 16, size // 64)):
                    stream.seek(place)
                    digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def bad_weight(model) -> str | None:
    """Return the name of a weight that is not finite, or None; under ZeRO-3 this rank's share is looked at."""
    import torch

    for name, parameter in model.named_parameters():
        weight = getattr(parameter, "ds_tensor", parameter)
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            return name
    return None


# --- the final model ----------------------------------------------------------------------------------------------


def verify_saved(folder: Path, expected: dict[str, tuple[int, ...]] | None = None) -> int:
    """Reopen saved safetensors: every tensor finite, and with the expected shape where `expected` names it.

    Returns the number of parameters. Raises ValueError naming the first tensor that is wrong.
    """
    import torch
    from safetensors import safe_open

    total, missing = 0, dict(expected or {})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no weights were saved (under ZeRO-3, gather them: ds_zero3.json does)")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                tensor = tensors.get_tensor(name)
                total += tensor.numel()
                if not tensor.numel() or not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: tensor {name} is empty or not finite; don't use this model")
                shape = missing.pop(name, tuple(tensor.shape))
                if shape != tuple(tensor.shape):
                    raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, {min(missing)} for one")
    return total


def saved_shapes(model) -> dict[str, tuple[int, ...]] | None:
    """Shapes that a full model's file must hold; tied tensors are saved once, under the name that is not tied.

    None for an adapter: its names change on saving, so `verify_saved` checks what is there.
    """
    if hasattr(model, "peft_config"):
        return None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    return {name: shape for name, shape in shapes.items() if name not in tied}


def move_into_place(staged: Path, folder: Path) -> None:
    """Move every file of `staged` into `folder`, the weights last, and remove `staged`."""
    names = sorted(os.listdir(staged), key=lambda name: (name.endswith((".safetensors", ".index.json")), name))
    for name in names:
        with open(staged / name, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(staged / name, folder / name)
    shutil.rmtree(staged)


# --- a model out of a ZeRO checkpoint -----------------------------------------------------------------------------


def consolidate(folder: str, output: str | None = None, max_shard_size: str = MAX_SHARD_SIZE) -> Path:
    """Rebuild the model of the newest sealed checkpoint, in fp32, from what each rank saved; return its folder.

    `folder` is a run's output_dir, or one checkpoint. Nothing pickled is run: the files must be those that were sealed,
    and hold only tensors and numbers. Raises ValueError otherwise, and when `output` holds something already.
    """
    checkpoint = _sealed_in(Path(folder))
    target = Path(output) if output else Path(folder) / "consolidated"
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty; name a new folder with --output")
    if not (checkpoint / "latest").is_file():
        raise ValueError(f"{checkpoint}: is no ZeRO checkpoint; its weights are in it as they are")
    shards = zero.Shards(checkpoint)
    check_space(checkpoint, 4 * sum(math.prod(shape) for shape in shards.shapes.values()), "the model")
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    staged.mkdir(parents=True)
    try:
        adapter = (checkpoint / "adapter_config.json").is_file()
        for path in checkpoint.iterdir():
            kept = path.suffix in (".jinja", ".json", ".model", ".txt") and not path.name.endswith(".index.json")
            if kept and path.name not in (MANIFEST, FINGERPRINT, PROGRESS, "trainer_state.json"):
                shutil.copyfile(path, staged / path.name)
        if adapter:  # the frozen base is no part of it; peft's own file is what was gathered from the same shards
            shutil.copyfile(checkpoint / "adapter_model.safetensors", staged / "adapter_model.safetensors")
        else:
            zero.write_weights(shards, staged, max_shard_size)
        verify_saved(staged, None if adapter else shards.shapes)
        target.mkdir(parents=True, exist_ok=True)
        move_into_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _sealed_in(folder: Path) -> Path:
    """The folder itself when it is a checkpoint, else the newest sealed one in it; says which were skipped."""
    if (folder / MANIFEST).is_file():
        problem = unsealed(folder)
        if problem:
            raise ValueError(f"{folder}: {problem}")
        return folder
    found, skipped = find_checkpoint(str(folder))
    for line in skipped:
        print(line)
    if found is None:
        raise ValueError(f"{folder}: holds no sealed checkpoint")
    return Path(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sft.checkpoint")
    commands = parser.add_subparsers(required=True, dest="command")
    rebuild = commands.add_parser("consolidate", help="rebuild a model from the newest sealed ZeRO checkpoint")
    rebuild.add_argument("folder", help="the output_dir of a run, or one checkpoint")
    rebuild.add_argument("--output", help="where to write the model; FOLDER/consolidated")
    rebuild.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="largest file of weights, as in 5GB")
    options = parser.parse_args(arguments)
    try:
        print(f"model rebuilt in {consolidate(options.folder, options.output, options.max_shard_size)}")
    except (ValueError, OSError) as error:
        print(f"sft.checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
