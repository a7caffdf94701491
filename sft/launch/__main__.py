"""The command `python -m sft.launch`."""

import sys

from sft.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
