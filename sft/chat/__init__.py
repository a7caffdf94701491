"""Talk to a checkpoint: one reply, a stream, a batch, a file of questions."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(
    __name__,
    {
        "reply": (
            "BLOSSOM",
            "GREEDY",
            "Chat",
            "Reply",
            "Sampling",
            "converse",
            "find_model",
            "load_base",
            "load_chat",
            "reply_to_file",
        ),
        "token_probabilities": ("to_html", "to_terminal"),
    },
)
