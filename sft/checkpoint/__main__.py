"""The command `python -m sft.checkpoint`."""

from sft.checkpoint.save import main

if __name__ == "__main__":
    main()
