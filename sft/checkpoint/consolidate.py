"""Rebuild a model from the newest ZeRO checkpoint of a run.

python -m sft.checkpoint consolidate runs/my_run/model --output rebuilt
"""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.base import ADAPTER
from sft.checkpoint import zero
from sft.checkpoint.manifest import FINGERPRINT, MANIFEST, PROGRESS, find_checkpoint, find_damage
from sft.checkpoint.save import check_disk_space
from sft.checkpoint.weights import verify_saved
from sft.files import MAX_SHARD_SIZE, stage_folder


def consolidate(folder: str, output: str | None = None, max_shard_size: str = MAX_SHARD_SIZE) -> Path:
    """Rebuild the model of the newest whole checkpoint, in fp32, from what each rank saved; return its folder.

    `folder` is a run's output_dir, or one checkpoint. No pickled code is run: the files must equal their manifest, and
    hold only tensors and numbers. Raises ValueError otherwise, and when `output` is not empty.
    """
    checkpoint = _find_whole_checkpoint(Path(folder))
    target = choose_target(checkpoint, output)
    if not (checkpoint / "latest").is_file():
        raise ValueError(f"{checkpoint}: is no ZeRO checkpoint; its weights are in it as they are")
    shards = zero.Shards(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(target.parent, 4 * sum(math.prod(shape) for shape in shards.shapes.values()), "the model")
    with stage_folder(target) as staged:
        _write_model(checkpoint, shards, staged, max_shard_size)
    return target


def choose_target(checkpoint: Path, output: str | None) -> Path:
    """Return the folder for the model: `output`, else `consolidated` beside the checkpoint.

    Raises ValueError when it is not empty, or in the checkpoint: with a further file that could not be resumed.
    """
    target = Path(output) if output else checkpoint.absolute().parent / "consolidated"
    if target.resolve().is_relative_to(checkpoint.resolve()):
        raise ValueError(f"{target}: is inside the checkpoint, which must stay as it is; name another --output")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty; name a new folder with --output")
    return target


def _write_model(checkpoint: Path, shards: zero.Shards, folder: Path, max_shard_size: str) -> None:
    for path in checkpoint.iterdir():
        is_kept = path.suffix in (".jinja", ".json", ".model", ".txt") and not path.name.endswith(".index.json")
        if is_kept and path.name not in (MANIFEST, FINGERPRINT, PROGRESS, "trainer_state.json"):
            shutil.copyfile(path, folder / path.name)
    has_adapter = (checkpoint / ADAPTER).is_file()
    if has_adapter:  # without the frozen base; peft's own file is what was gathered from the same shards
        shutil.copyfile(checkpoint / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    else:
        zero.write_weights(shards, folder, max_shard_size)
    verify_saved(folder, None if has_adapter else shards.shapes)


def _find_whole_checkpoint(folder: Path) -> Path:
    """Return the folder itself when it is a checkpoint, else the newest whole one in it; prints which were skipped."""
    if (folder / MANIFEST).is_file():
        problem = find_damage(folder)
        if problem:
            raise ValueError(f"{folder}: {problem}")
        return folder
    found, skipped = find_checkpoint(str(folder))
    for line in skipped:
        print(line)
    if found is None:
        raise ValueError(f"{folder}: holds no whole checkpoint")
    return Path(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sft.checkpoint")
    commands = parser.add_subparsers(required=True, dest="command")
    rebuild = commands.add_parser("consolidate", help="rebuild a model from the newest ZeRO checkpoint")
    rebuild.add_argument("folder", help="the output_dir of a run, or one checkpoint")
    rebuild.add_argument("--output", help="folder for the model; default consolidated, in the output_dir")
    rebuild.add_argument("--max_shard_size", default=MAX_SHARD_SIZE, help="largest file of weights, as in 5GB")
    options = parser.parse_args(arguments)
    try:
        print(f"model rebuilt in {consolidate(options.folder, options.output, options.max_shard_size)}")
    except (ValueError, OSError) as error:
        print(f"sft.checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
