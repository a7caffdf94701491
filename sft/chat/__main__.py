"""The command `python -m sft.chat`."""

from sft.chat.terminal import main

if __name__ == "__main__":
    main()
