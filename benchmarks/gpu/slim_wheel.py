"""Rewrite bitsandbytes' wheel without the libraries of other CUDA versions: 58 MiB become about 4.

python benchmarks/gpu/slim_wheel.py FOLDER/bitsandbytes-0.49.2-….whl 130
"""

import csv
import io
import re
import sys
import zipfile
from pathlib import Path


def slim(wheel: Path, cuda: str) -> None:
    """Keep the library of one CUDA version (130 is 13.0), and leave the others out of RECORD too."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as target:
        kept = [name for name in source.namelist() if not is_other_library(name, cuda)]
        for name in kept:
            content = source.read(name)
            if name.endswith(".dist-info/RECORD"):
                rows = [row for row in csv.reader(io.StringIO(content.decode())) if row and row[0] in kept]
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(rows)
                content = text.getvalue().encode()
            target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
    part.rename(wheel)


def is_other_library(name: str, cuda: str) -> bool:
    found = re.search(r"libbitsandbytes_(cuda|rocm|xpu)(\d*)", name)
    return found is not None and (found[1], found[2]) != ("cuda", cuda)


if __name__ == "__main__":
    slim(Path(sys.argv[1]), sys.argv[2])
