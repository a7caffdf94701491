"""How sure the model was: probabilities that are its own, text that is the reply's, nothing that a reply can forge."""

import pytest
import torch

from sft.chat.reply import load_chat
from sft.chat.sampling import Sampling
from sft.chat.token_probabilities import Piece, least_certain, score_tokens, to_html, to_printable, to_terminal

SURE, UNSURE = Piece("好", 0.95, [("坏", 0.04)]), Piece(" a<b>", 0.1, [("\n", 0.5), ("\x1b", 0.2)])


def test_the_pieces_of_each_family_are_the_reply_with_the_models_own_probabilities(family, tiny_base):
    chat = load_chat(str(tiny_base(family)))
    messages = [{"role": "user", "content": "你好"}]
    reply, pieces = chat.reply_with_pieces(messages, Sampling(temperature=0.0, max_new_tokens=12))
    assert reply == chat.reply(messages, Sampling(temperature=0.0, max_new_tokens=12))
    said = pieces[:-1] if reply.ended else pieces
    assert "".join(piece.text for piece in said).strip() == reply.text
    assert all(0 < piece.probability <= 1 and len(piece.alternatives) == 4 for piece in pieces)


def test_a_probability_is_that_of_the_token_after_all_before_it(tiny_base):
    chat = load_chat(str(tiny_base("qwen2")))
    prompt = chat.prompt_ids([{"role": "user", "content": "你好"}])
    ids = chat.renderer.tokenizer("Hello one two", add_special_tokens=False)["input_ids"] * 30
    pieces = score_tokens(chat.model, chat.renderer.tokenizer, prompt, ids)
    with torch.inference_mode():
        last = chat.model(torch.tensor([prompt + ids[:-1]])).logits[0, -1].softmax(-1)
    assert len(ids) > 64 and len(pieces) == len(ids)
    assert pieces[-1].probability == pytest.approx(float(last[ids[-1]]), rel=1e-4)
    others = [token for token in last.topk(5).indices.tolist() if token != ids[-1]][:4]
    assert [share for _text, share in pieces[-1].alternatives] == pytest.approx(last[others].tolist(), rel=1e-4)
    assert score_tokens(chat.model, chat.renderer.tokenizer, prompt, []) == []


def test_tokens_that_make_up_one_character_are_one_piece(tiny_base):
    chat = load_chat(str(tiny_base("qwen2")))
    tokenizer = chat.renderer.tokenizer
    ids = tokenizer("a🦜b", add_special_tokens=False)["input_ids"]
    pieces = score_tokens(chat.model, tokenizer, chat.prompt_ids([{"role": "user", "content": "你好"}]), ids)
    assert len(ids) > 3 and [piece.text for piece in pieces] == ["a", "🦜", "b"]


def test_a_reply_is_text_in_html_and_in_a_terminal():
    shown = to_html([SURE, Piece('<img src=x onerror="a">', 0.2, [('"><script>', 0.1)])])
    assert "<img" not in shown and "<script" not in shown and 'onerror="' not in shown
    assert 'hsl(114 70% 82%);color:#000" title="&#x27;好&#x27; 0.95; else &#x27;坏&#x27; 0.04">好</span>' in shown
    assert to_printable("a\x1b[2J\x9b\nb\tc\r") == "a\ufffd[2J\ufffd\nb\tc\ufffd"


def test_a_terminal_shows_colours_and_a_pipe_shows_what_is_unsure():
    assert least_certain([SURE, UNSURE], 1) == [UNSURE]
    alternatives = ["  ' a<b>' 0.10; else '\\n' 0.50, '\\x1b' 0.20", "  '好' 0.95; else '坏' 0.04"]
    coloured = to_terminal([SURE, UNSURE], colour=True).split("\n")
    assert coloured == ["\033[32m好\033[0m\033[31m a<b>\033[0m", *alternatives]
    assert to_terminal([SURE, UNSURE], colour=False).split("\n") == ["好⟦ a<b> 0.10⟧", *alternatives]
