"""What is said before a run starts."""

import json

import numpy as np
import pytest

from sft.chat_format import Renderer
from sft.preflight import check_deepspeed_config, paint
from tests.conftest import ROOT


def test_the_trained_stretches_are_marked_with_and_without_colour(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"), "chatml")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = renderer.render(messages)
    plain = paint(renderer.tokenizer, rendered.input_ids, rendered.labels, colour=False)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    coloured = paint(renderer.tokenizer, rendered.input_ids, rendered.labels, colour=True)
    assert "\033[32mHello<|im_end|>\033[0m" in coloured
    nothing = np.zeros(0, dtype=np.int32)
    assert paint(renderer.tokenizer, nothing, nothing, colour=False) == ""


@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3.json"])
def test_our_own_deepspeed_files_pass(name):
    assert check_deepspeed_config(str(ROOT / name)) == []
    config = json.loads((ROOT / name).read_text())
    assert config["gradient_clipping"] == config["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"gradient_clipping": "auto", "scheduler": {"type": "WarmupLR"}}', "remove the 'scheduler' block"),
        ('{"gradient_clipping": "auto", "optimizer": {}}', "remove the 'optimizer' block"),
        (
            '{"gradient_clipping": "auto", "zero_optimization": {"stage": 3}}',
            "stage3_gather_16bit_weights_on_model_save must be true",
        ),
        ('{"zero_optimization": {"stage": 2}}', 'add "gradient_clipping": "auto"'),
        ("[1]", "must hold a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_deepspeed_settings_that_fail_late_or_change_the_run_are_refused(tmp_path, config, problem):
    (tmp_path / "ds.json").write_text(config)
    (line,) = check_deepspeed_config(str(tmp_path / "ds.json"))
    assert problem in line


def test_a_missing_deepspeed_file_names_those_there_are():
    assert check_deepspeed_config("ds_zero9.json") == [
        "--deepspeed ds_zero9.json: no such file; use ds_zero2.json or ds_zero3.json"
    ]
