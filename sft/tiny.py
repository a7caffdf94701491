"""The command `python -m sft.tiny`: build a tiny random base of a family, for a CPU."""

from sft.model.tiny import main

if __name__ == "__main__":
    main()
