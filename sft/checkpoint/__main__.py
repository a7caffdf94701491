"""The command `python -m sft.checkpoint`."""

from sft.checkpoint.consolidate import main

if __name__ == "__main__":
    main()
