"""The command `python -m sft.chat`."""

from sft.chat.reply import main

if __name__ == "__main__":
    main()
