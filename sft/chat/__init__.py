"""Talk to a checkpoint: one reply, a stream, a batch, a file of questions."""

from sft.reexport import load_on_use

__getattr__ = load_on_use(
    __name__,
    {
        "reply": ("Chat", "Reply", "find_model", "load_base", "load_chat"),
        "sampling": ("BLOSSOM", "GREEDY", "Sampling"),
        "answer_file": ("reply_to_file",),
        "terminal": ("converse",),
        "token_probabilities": ("to_html", "to_terminal"),
    },
)
