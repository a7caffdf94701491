"""Conversations to token ids and labels."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(__name__, {"render": ("Renderer",), "table": ("CHAT_FORMATS", "FORMAT_NAMES")})
