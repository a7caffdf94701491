"""The command `python -m sft.chat`."""

import gc

from sft.chat.terminal import main

if __name__ == "__main__":
    gc.disable()  # while torch and transformers are imported: collecting takes half a second of 4, and frees nothing
    main()
