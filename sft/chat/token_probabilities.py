"""How sure a model was of each token of a reply, in colour: for a notebook (HTML) or a terminal (ANSI).

The probabilities are the model's own, before temperature, top p, top k and repetition penalty.
"""

import html
import inspect
from collections.abc import Sequence
from typing import NamedTuple

from sft.format.tokens import HALF_CHARACTER
from sft.model.load import family_model

PIECE = 64  # tokens whose probabilities over the whole vocabulary are held at a time
BANDS = ((0.9, "32"), (0.5, "36"), (0.2, "33"), (0.0, "31"))  # from this probability on: green, cyan, yellow, red


class Piece(NamedTuple):
    """A token, or the few that make up one character; `alternatives` were likeliest beside the first of them."""

    text: str
    probability: float
    alternatives: list[tuple[str, float]]


def score_tokens(
    model, tokenizer, prompt: Sequence[int], ids: Sequence[int], *, num_alternatives: int = 4
) -> list[Piece]:
    """Read prompt and reply once more and return the reply's pieces, its stop token included."""
    if not ids:
        return []
    pieces = []
    before = []
    start = 0
    scored = _probabilities(model, prompt, ids, num_alternatives + 1)
    for end in range(1, len(ids) + 1):
        group = list(ids[start:end])
        text = _text(tokenizer, before, group)
        # A character of several tokens decodes to U+FFFD until its last token is there.
        if text.endswith(HALF_CHARACTER) and end < len(ids):
            continue
        probability = 1.0
        for chosen, _likeliest in scored[start:end]:
            probability *= chosen
        others = [(token, share) for token, share in scored[start][1] if token != group[0]][:num_alternatives]
        alternatives = [(_text(tokenizer, before, [token]), share) for token, share in others]
        pieces.append(Piece(text, probability, alternatives))
        before = group
        start = end
    return pieces


def _probabilities(model, prompt: Sequence[int], ids: Sequence[int], count: int) -> list[tuple[float, list]]:
    """Return for each of `ids` its probability and the `count` likeliest tokens with theirs."""
    import torch

    base = family_model(model)
    options = {"logits_to_keep": len(ids)} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    read = torch.tensor([[*prompt, *ids[:-1]]], device=model.device)
    found = []
    with torch.inference_mode():
        logits = model(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False, **options).logits[0]
        for first, part in zip(range(0, len(ids), PIECE), logits[-len(ids) :].split(PIECE), strict=True):
            shares = part.float().softmax(-1)
            top, tokens = shares.topk(min(count, shares.shape[-1]))
            chosen = torch.tensor(ids[first : first + PIECE], device=shares.device)[:, None]
            for row in zip(shares.gather(1, chosen)[:, 0].tolist(), tokens.tolist(), top.tolist(), strict=True):
                found.append((row[0], list(zip(row[1], row[2], strict=True))))
    return found


def _text(tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text that `ids` add after `before`; alone, some tokenizers leave out the space in front."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode(before + ids)[len(decode(before)) :] if before else decode(ids)


def least_certain(pieces: Sequence[Piece], count: int = 3) -> list[Piece]:
    """The pieces that the model was least sure of, the least first."""
    return sorted(pieces, key=lambda piece: piece.probability)[:count]


def to_printable(text: str) -> str:
    """Return text without the control characters that could move a terminal's cursor or change its settings."""
    return "".join(
        char if char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f") else "\ufffd" for char in text
    )


def to_terminal(pieces: Sequence[Piece], *, colour: bool) -> str:
    """Return the reply with its unsure tokens in colour, or in ⟦ ⟧ with their probability, and the alternatives."""
    shown = []
    for piece in pieces:
        text = to_printable(piece.text)
        if colour:
            code = next(code for least, code in BANDS if piece.probability >= least)
            text = f"\033[{code}m{text}\033[0m"
        elif piece.probability < BANDS[1][0]:
            text = f"⟦{text} {piece.probability:.2f}⟧"
        shown.append(text)
    return "\n".join(["".join(shown), *(f"  {to_printable(line)}" for line in _alternatives(pieces))])


def to_html(pieces: Sequence[Piece]) -> str:
    """Return the reply as HTML, from red (unsure) to green; the pointer shows each token's alternatives."""
    spans = []
    for piece in pieces:
        title = html.escape(_describe(piece))
        style = f"background:hsl({120 * piece.probability:.0f} 70% 82%);color:#000"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(piece.text)}</span>')
    rows = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in _alternatives(pieces))
    return f'<div style="white-space:pre-wrap;line-height:1.7">{"".join(spans)}</div><ul>{rows}</ul>'


def _alternatives(pieces: Sequence[Piece]) -> list[str]:
    return [_describe(piece) for piece in least_certain(pieces)]


def _describe(piece: Piece) -> str:
    others = ", ".join(f"{text!r} {share:.2f}" for text, share in piece.alternatives)
    return f"{piece.text!r} {piece.probability:.2f}; else {others}"
