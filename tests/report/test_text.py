"""Text for a terminal."""

import numpy as np

from sft.format.render import Renderer
from sft.report.text import paint


def test_the_trained_tokens_are_marked_with_and_without_colour(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"), "chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = renderer.render(messages)
    plain = paint(renderer.tokenizer, rendered.input_ids, rendered.labels, colour=False)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    coloured = paint(renderer.tokenizer, rendered.input_ids, rendered.labels, colour=True)
    assert "\033[32mHello<|im_end|>\033[0m" in coloured
    nothing = np.zeros(0, dtype=np.int32)
    assert paint(renderer.tokenizer, nothing, nothing, colour=False) == ""
