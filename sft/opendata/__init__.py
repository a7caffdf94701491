"""Raw files of every known form to canonical conversations."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(
    __name__,
    {"build": ("MIXES", "build_opendata", "print_ledger"), "conversation": ("list_files", "read_conversations")},
)
