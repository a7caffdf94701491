"""The command `python -m sft.evaluate`."""

from sft.evaluate.command import main

if __name__ == "__main__":
    main()
