"""The command `python -m sft.opendata`."""

import sys

from sft.opendata.build import main

if __name__ == "__main__":
    sys.exit(main())
