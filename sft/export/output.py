"""The folder that an export writes: a new one, which appears only when its content is whole and checked."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sft.files import stage_folder


def check_output_dir(output_dir: str) -> str | None:
    """Return why `output_dir` can't become a new folder, or None."""
    return f"--output_dir {output_dir}: exists; name a new folder" if os.path.lexists(_absolute(output_dir)) else None


@contextlib.contextmanager
def stage_output(output_dir: str) -> Iterator[Path]:
    """A temporary folder beside `output_dir`, renamed to it when the block ends well, else deleted."""
    if problem := check_output_dir(output_dir):
        raise ValueError(problem)
    target = _absolute(output_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with stage_folder(target) as staged:
        yield staged


def _absolute(output_dir: str) -> Path:
    return Path(output_dir).expanduser().absolute()
