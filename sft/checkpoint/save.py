"""Save a checkpoint: to a temporary folder, fsynced, hashed, then renamed; and delete old ones.

output_dir/.saving/                 a checkpoint or model while it is written, with the run's identity in run.json
    written-3.json                  sizes and hashes of what rank 3 has written of the checkpoint, when all of it is
output_dir/.removed-checkpoint-20/  a checkpoint while it is deleted
"""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

from sft.checkpoint.manifest import (
    MANIFEST,
    checkpoint_bytes,
    hash_files,
    is_of_run,
    list_checkpoints,
    read_manifest,
    step_of,
    write_manifest,
)
from sft.files import PARTIAL, move_files, remove_cut_off, sync_folder, write_json
from sft.launch.processes import LOCK, RANKS

SAVING = ".saving"
MARKER = "run.json"
PAGE = "report.html"  # all that a run leaves that ended before its first checkpoint; written again at every start
UNUSED_FILES = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")  # pickled arguments; scripts
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch and safetensors report a full disk.
FULL_DISK_WORDS = r"No space left|inline_container|PytorchStreamWriter failed|File too large|os error 28"


def find_path_fault(path: str) -> str | None:
    """Return why no file can have this path, as where a name is too long, or None; it need not exist."""
    try:
        os.stat(os.path.expanduser(path))
    except ValueError as error:  # a NUL
        return str(error)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) else error.strerror
    return None


def check_folder(flag: str, path: str) -> str | None:
    """Return why nothing can be written into a folder, which need not exist yet, or None."""
    existing = Path(path).expanduser()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"--{flag} {path}: {existing} can't be written to"
    return None


def check_output_dir(output_dir: str, *, resume: bool) -> str | None:
    """Return why `output_dir` can't be written to, or None. A folder that is not empty is only for resuming."""
    if problem := check_folder("output_dir", output_dir):
        return problem
    folder = Path(output_dir).expanduser()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    leftovers = {LOCK, RANKS, PAGE} if read_written(folder) else {LOCK, RANKS, PAGE, SAVING}
    foreign = {name for name in names - leftovers if not name.endswith(PARTIAL)}
    if not resume and foreign:
        return (
            f"--output_dir {output_dir}: is not empty, and nothing in it will be overwritten; name a new folder, or "
            "continue the run in it with --resume_from_checkpoint auto"
        )
    return None


def open_staging(output_dir: Path, run: str) -> Path:
    """Return the temporary folder for a checkpoint or model, empty but for the run's identity."""
    remove_leftovers(output_dir)
    folder = output_dir / SAVING
    folder.mkdir(exist_ok=True)
    write_json(folder / MARKER, {"run": run})
    return folder


def remove_leftovers(output_dir: Path) -> list[str]:
    """Delete what a killed save left; return a line for each. ValueError when `.saving` is not of a run of ours."""
    folder = output_dir / SAVING
    lines = []
    remove_cut_off(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ValueError(f"{folder}: this is not of a run of ours; move it away")
        lines = [f"{path}: skipped and removed, its save was cut off" for path in folder.iterdir() if path.is_dir()]
        # The files of the ranks first, the marker last: a deletion that is killed is finished at the next start.
        for path in sorted(set(folder.iterdir()) - {folder / MARKER}, key=Path.is_dir):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        shutil.rmtree(folder)
    for path in output_dir.glob(".removed-checkpoint-*/"):
        lines.append(_delete_listed_files(path))
    remove_cut_off(output_dir)
    return [line for line in lines if line]


def list_files(folder: Path) -> list[str]:
    """Return all files of a checkpoint but its manifest, sorted; files that are never read again are deleted first."""
    for name in UNUSED_FILES:
        (folder / name).unlink(missing_ok=True)
    paths = [path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != MANIFEST)


def note_written(folder: Path, hashes: dict[str, list], *, rank: int, world_size: int) -> None:
    """Store that a rank has written its files of the checkpoint in `folder`, and their [bytes, sha256]."""
    write_json(folder.parent / f"written-{rank}.json", {"world_size": world_size, "files": hashes}, ensure_ascii=True)


def read_written(output_dir: Path) -> tuple[Path, dict[str, list], str] | None:
    """Return the folder, the hashes and the run of a checkpoint that all ranks have written, and none has renamed."""
    saving = output_dir / SAVING
    folders = [path for path in saving.glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    try:
        run = json.loads((saving / MARKER).read_text(encoding="utf-8"))["run"]
        world_size = json.loads((saving / "written-0.json").read_text(encoding="utf-8"))["world_size"]
        ranks = [json.loads((saving / f"written-{rank}.json").read_text("utf-8")) for rank in range(world_size)]
        hashes = {name: (size, sha256) for rank in ranks for name, (size, sha256) in rank["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (folders[0], hashes, run) if len(folders) == 1 else None


def recover_checkpoint(output_dir: Path) -> list[str]:
    """Complete a checkpoint that all ranks had written when their run ended, then `remove_leftovers`; return lines."""
    lines = []
    if written := read_written(output_dir):
        folder, hashes, run = written
        try:
            _size, aside = complete_checkpoint(folder, output_dir / folder.name, hashes, run=run)
            lines = [f"{output_dir / folder.name}: completed; its run ended when its files were written", aside]
        except (FileNotFoundError, ValueError) as error:
            lines = [f"{folder}: can't be completed ({error})"]
        except OSError as error:
            raise explain_error(error, str(output_dir)) from error
    return [*filter(None, lines), *remove_leftovers(output_dir)]


def complete_checkpoint(folder: Path, final: Path, hashes: dict[str, list], *, run: str) -> tuple[int, str | None]:
    """Write the manifest of a checkpoint and rename it; `hashes`: [bytes, sha256] of files, by name, that are known.

    Returns its bytes, and a line when `publish_checkpoint` set a folder aside. ValueError for a file of another size.
    """
    remove_cut_off(folder)
    others = [name for name in list_files(folder) if name not in hashes]
    files = hashes | hash_files(folder, others, sync=True)
    for name, (size, _sha256) in files.items():  # a network file system may list another machine's files late
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} bytes, not {size:,}")
    write_manifest(folder, files, step=step_of(folder), run=run)
    return sum(size for size, _sha256 in files.values()), publish_checkpoint(folder, final, run)


def publish_checkpoint(staged: Path, final: Path, run: str) -> str | None:
    """Rename a complete checkpoint to its name; an old one of this run is deleted, any other folder is set aside.

    Returns a line when a folder was set aside. `recover_checkpoint` ends what a kill between the renames cut off.
    """
    is_ours = is_of_run(final, run)
    removed = final.with_name(f".removed-{final.name}")
    line = None
    if is_ours:
        os.rename(final, removed)
    elif final.exists():
        line = _set_aside(final, final)
    os.rename(staged, final)
    sync_folder(final.parent)
    if is_ours:
        line = _delete_listed_files(removed)
    return line


def _set_aside(folder: Path, final: Path) -> str:
    """Rename a folder with files that are not of the checkpoint `final`, and return a line."""
    aside = next(path for k in range(1, 10**6) if not (path := Path(f"{final}.set-aside-{k}")).exists())
    os.rename(folder, aside)
    return f"{aside}: was {final.name}, with files that this run did not write; it is kept under this name"


def delete_old_checkpoints(output_dir: Path, *, keep: int | None, step: int, run: str, spare: str | None) -> None:
    """Delete this run's checkpoints up to `step` but the newest `keep` and `spare`; only files of their manifests."""
    ours = [folder for folder in list_checkpoints(output_dir) if step_of(folder) <= step and is_of_run(folder, run)]
    for folder in ours[: -max(1, keep)] if keep else []:
        if str(folder) != spare:
            removed = folder.with_name(f".removed-{folder.name}")
            os.rename(folder, removed)
            _delete_listed_files(removed)


def _delete_listed_files(removed: Path) -> str | None:
    """Delete the files that the manifest of `.removed-NAME` names, the manifest last; others stay, under NAME.

    If NAME is taken they are set aside, and a line is returned. Without a manifest all its files were deleted before.
    """
    try:
        names = [*read_manifest(removed)["files"], MANIFEST]
    except ValueError:
        names = []
    for name in names:
        (removed / name).unlink(missing_ok=True)
    for path in sorted(removed.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    final = removed.with_name(removed.name.removeprefix(".removed-"))
    if not any(removed.iterdir()):
        removed.rmdir()
    elif final.exists():
        return _set_aside(removed, final)
    else:
        os.rename(removed, final)
    return None


def publish_model(staged: Path, folder: Path) -> None:
    """Move every file of `staged` into `folder`, the weights last, and delete `staged`."""
    names = sorted(os.listdir(staged), key=lambda name: (name.endswith((".safetensors", ".index.json")), name))
    move_files(staged, folder, names)
    shutil.rmtree(staged)


def estimate_bytes(output_dir: Path, model, *, has_masters: bool) -> int:
    """Return the bytes of the next checkpoint: as large as the last one; the first: weights and two moments in fp32.

    `has_masters`: with a copy of the weights in fp32, as DeepSpeed keeps it.
    """
    sizes = [checkpoint_bytes(folder) for folder in output_dir.glob("checkpoint-*") if folder.is_dir()]
    if any(sizes):
        return max(sizes) * 101 // 100
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(getattr(p, "ds_numel", p.numel()) * (16 if has_masters else 12) for p in trained)


def check_disk_space(folder: Path, needed: int, what: str) -> None:
    """Raise ValueError when the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        disk = next(path for path in (folder.resolve(), *folder.resolve().parents) if os.path.ismount(path))
        raise ValueError(
            f"{folder}: the disk at {disk} has {free:,} bytes free, and {what} needs {needed:,}; nothing was removed. "
            "Make room, then continue with --resume_from_checkpoint auto"
        )


def explain_error(error: Exception, folder: str) -> Exception:
    """Return the error of a save to `folder`; when a disk is full, a ValueError that says so."""
    if not is_full_disk(error):
        return error
    reason = str(error).splitlines()[0]
    return ValueError(f"{folder}: the disk is full ({reason}); the checkpoints in it are whole")


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of a save says that a disk or quota is full."""
    return (isinstance(error, OSError) and error.errno in FULL_DISK) or bool(re.search(FULL_DISK_WORDS, str(error)))
