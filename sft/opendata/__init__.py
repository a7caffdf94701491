"""Raw files of every known form to canonical conversations."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(
    __name__,
    {
        "build": ("build_opendata",),
        "files": ("MIXES", "list_files"),
        "conversation": ("read_conversations",),
        "__main__": ("find_problem", "print_ledger"),
    },
)
