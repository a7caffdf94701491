"""The command `python -m sft.export`."""

from sft.export.command import main

if __name__ == "__main__":
    main()
