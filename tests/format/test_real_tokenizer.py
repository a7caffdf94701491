"""A real tokenizer and a real chat template: 49,152 tokens whose merges reach over the edges of turns."""

import pytest

from sft.embeddings import find_untrained
from sft.format.contract import check_contract, choose_format
from sft.format.render import Renderer
from sft.format.table import CHAT_FORMATS
from sft.format.tokens import IGNORE_INDEX
from sft.model.load import load_tokenizer

pytestmark = pytest.mark.slow

# Starts and ends that merge with a header, a space or a newline beside them.
REPLIES = (
    *("**bold** first", "2024 was a year", "'quoted'", "...so", "\n\nafter newlines", "  two spaces", "- a list"),
    *("```py\nx = 1\n```", "😀👍🏽 ok", "你好！", "don't", "3.14159", "</think> no", "|Bot|: no", "ends: ", "a\n"),
)


@pytest.fixture(scope="module")
def tokenizer(real_base):
    return load_tokenizer(str(real_base))


def test_auto_sees_that_the_control_tokens_of_a_chat_model_are_trained(tokenizer):
    assert choose_format("auto", tokenizer) == (
        "base",
        "the model's own template passes the checks, and the model ends its replies with <|im_end|>; "
        "the embedding rows of <|im_start|>, <|im_end|> are trained",
    )
    unused = tokenizer.convert_tokens_to_ids(["<gh_stars>", "<jupyter_code>"])
    assert find_untrained(tokenizer.name_or_path, unused, num_tokens=len(tokenizer)) == (unused, False)


def conversation(reply: str) -> list[dict]:
    first = [{"role": "user", "content": f"Repeat: {reply}"}, {"role": "assistant", "content": reply}]
    return [*first, {"role": "user", "content": "Again."}, {"role": "assistant", "content": reply}]


def starts_reply_after(prompt: list[int], row) -> bool:
    """Whether a row begins with the prompt, and its first token in the loss there is the next one."""
    ids, labels, length = row.input_ids.tolist(), row.labels.tolist(), len(prompt)
    return ids[:length] == prompt and labels[length - 1] == IGNORE_INDEX and labels[length] == ids[length]


@pytest.mark.parametrize("name", ["base", *CHAT_FORMATS])
def test_training_ids_begin_with_the_ids_that_a_server_gets(tokenizer, name):
    renderer = Renderer(tokenizer, name)
    server = load_tokenizer(tokenizer.name_or_path)
    server.chat_template = renderer.chat_template
    for reply in REPLIES:
        messages = conversation(reply)
        rows = renderer.render_conversation(messages)
        for index in (1, 3):
            served = server.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
            prompt = server(served, add_special_tokens=False)["input_ids"]
            assert any(starts_reply_after(prompt, row) for row in rows), reply
    assert check_contract(renderer, [conversation(reply) for reply in REPLIES]) == []


def test_a_reply_that_merges_with_the_header_takes_a_row_of_its_own(tokenizer):
    """SmolLM2's template doesn't trim: the header's newline and those of the reply would become one token."""
    renderer = Renderer(tokenizer, "base")
    assert [len(renderer.render_conversation(conversation(reply))) for reply in ("fine", "\n\nafter newlines")] == [
        1,
        2,
    ]


def test_the_templates_default_system_line_is_in_the_prompt_and_not_in_the_loss(tokenizer):
    row = Renderer(tokenizer, "base").render(conversation("Paris."))
    trained = tokenizer.decode([token for token, label in zip(*row[:2], strict=True) if label != IGNORE_INDEX])
    assert tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert trained == "Paris.<|im_end|>Paris.<|im_end|>"
