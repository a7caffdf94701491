"""A tiny twin goes through the run in a dry run: refused is one as the other, in the same words."""

import numpy as np
import pytest

import train
from sft.dataset.dataset import Examples
from sft.preview import twin
from tests.preview.test_dry_run import copied, dry_run, set_up  # noqa: F401 (fixtures)


def test_the_twin_takes_the_ends_of_the_first_examples():
    ids = np.arange(100, dtype=np.int32)
    examples = Examples(ids, ids % 2 == 1, np.array([0, 3, 100]))
    found = twin._take_ends(examples)
    assert found.lengths.tolist() == [3, twin.EXAMPLE_TOKENS]
    assert found[0]["labels"].tolist() == [-100, 1, -100]
    assert found[1]["input_ids"].tolist() == list(range(100 - twin.EXAMPLE_TOKENS, 100))
    assert len(twin._take_ends(Examples(ids[:0], ids[:0] > 0, np.array([0])))) == 0


def test_a_part_that_did_not_end_failed():
    parts = twin.Parts()
    parts.begin("loading", "adapters")
    assert [row[:2] for row in parts.table()] == [
        ["part", "result"],
        ["making it", "passed"],
        ["loading, adapters", "failed"],
        ["all", ""],
    ]
    parts.is_over = True
    assert parts.table()[2][1] == "passed"


@pytest.mark.slow
def test_a_dry_run_refuses_a_type_that_a_run_refuses(copied, capsys, tmp_path):  # noqa: F811
    code = "from transformers import Qwen2Config as C\nfrom transformers import Qwen2ForCausalLM as M\n"
    code += "class C(C):\n    model_type = 'mine'\n"
    code += "class M(M):\n    config_class = C\n    supports_gradient_checkpointing = False\n"
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    flags = {"--trust_remote_code": "true", "--gradient_checkpointing": "true", "--max_new_tokens": "4"}
    run = copied({"config.json": own, "own.py": code.encode()}) | flags
    del run["--gpu"]
    with pytest.raises(ValueError, match="does not support") as refused:
        train.main([word for pair in run.items() for word in pair])
    dry = copied({"model.safetensors": None, "config.json": own, "own.py": code.encode()}) | flags
    found, text, problems = dry_run(capsys, dry)
    assert (found, problems) == (2, [str(refused.value)])
    assert "self-tests, a step" in text and "failed" in text


def test_a_config_that_cannot_be_shrunk_is_a_note(set_up, capsys, monkeypatch):  # noqa: F811
    def refuse(*_arguments, **_options):
        raise KeyError("num_layers")

    monkeypatch.setattr("sft.preview.twin.shrink_config", refuse)
    code, text, problems = dry_run(capsys, set_up)
    assert (code, problems) == (0, [])
    assert "note: qwen2: no tiny twin can be made of this config: KeyError: 'num_layers'" in text
