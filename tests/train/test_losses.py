"""Sums of the training loop beside the loss of a step."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sft.dataset.dataset import ORIGIN
from sft.train.losses import MAX_SOURCES, RouterLosses, clip_in_optimizer, group_sources, statistics_of_rows
from tests.scripts import sh


def examples(*numbers: int):
    return SimpleNamespace(origins=np.array([(number, 0) for number in numbers], ORIGIN))


def test_the_statistics_of_a_row_look_one_token_ahead():
    guesses, labels = torch.tensor([[7, 8, 9, 0], [1, 0, 0, 0]]), torch.tensor([[-100, 7, 8, 1], [-100, 1, -100, -100]])
    losses = torch.tensor([[0.5, 0.25, 2.0, torch.nan], [0.125, torch.nan, torch.nan, torch.nan]])
    expected = [[2.75, 2, 3], [0.125, 1, 1]]
    assert statistics_of_rows((losses, guesses), labels).tolist() == expected
    logits = torch.nn.functional.one_hot(guesses, 10).float() * 5
    found = statistics_of_rows(logits, labels)
    assert found[:, 1:].tolist() == [[2, 3], [1, 1]]
    alone = torch.nn.functional.cross_entropy(logits[1, :1], labels[1, 1:2])
    assert float(found[1, 0]) == pytest.approx(float(alone), rel=1e-6)


def test_sources_are_numbered_and_the_small_ones_are_one():
    few = group_sources([(examples(0, 1, 1), ["a b", "中文"]), (examples(0), ["中文"])])
    assert few.names == ("中文", "a_b")
    assert (few.train.tolist(), few.held_out.tolist()) == ([1, 0, 0], [0])
    assert group_sources([(examples(0, 0), ["train.json"]), (examples(0), ["eval.json"])]) is None
    names = [f"s{number}" for number in range(MAX_SOURCES + 3)]
    many = group_sources([(examples(*range(len(names)), *range(7)), names), (examples(0, 1), ["s11", "new"])])
    assert many.names == (*names[:7], "s11", "5_other_sources")
    assert many.train.tolist()[7:12] == [8, 8, 8, 8, 7]
    assert many.held_out.tolist() == [7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_losses_by_source_are_the_same_on_two_processes_and_add_up_to_that_of_all(packing, tiny_base, tmp_path):
    """Seven held-out rows in batches of two: the last step has too few of them for both processes."""
    sizes = {"a": (3, 9, 1), "b": (30,), "中 文": (5, 8, 2)}
    (tmp_path / "data").mkdir()
    for file in ("train.json", "eval.json"):
        with open(tmp_path / "data" / file, "w", encoding="utf-8") as stream:
            for source, words in sizes.items():
                for number in words:
                    reply = {"role": "assistant", "content": "word " * number}
                    messages = [{"role": "user", "content": f"{file} {source} {number}"}, reply]
                    stream.write(json.dumps({"id": "", "source": source, "messages": messages}) + "\n")
    found = []
    for script in ("base_run.sh", "ds_all.sh"):
        knobs = {
            "MODEL": str(tiny_base("qwen2")),
            "DATA": str(tmp_path / "data"),
            "MAX_LENGTH": "256",
            "BATCH_SIZE": "2",
        }
        knobs |= {"ACCUMULATION": "4", "OUTPUT": str(tmp_path / script), "NUM_GPUS": "2", "ZERO": "3"}
        flags = ("--max_steps", "1", "--logging_steps", "1", "--packing", packing, "--num_reply_prompts", "0")
        flags += ("--max_new_tokens", "2", "--cache_dir", str(tmp_path / "cache"), "--per_device_eval_batch_size", "2")
        done = sh(script, *flags, **knobs)
        assert done.returncode == 0, done.stderr[-3000:]
        history = json.loads((tmp_path / script / "model" / "run.json").read_text())["log_history"]
        found.append({name: entry[name] for entry in history for name in entry if "loss" in name})
    assert (
        found[0].keys() == found[1].keys() >= {"loss/a", "loss/中_文", "eval_loss/a", "eval_loss/b", "eval_loss/中_文"}
    )
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_router_loss_of_a_mixture_is_logged_summed_up_and_leaves_evaluation_alone(tiny_base, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

    import train
    from sft.model.shrink import shrink_config

    base = shutil.copytree(tiny_base("qwen2"), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = shrink_config(Qwen3MoeConfig(output_router_logits=True, router_aux_loss_coef=0.5))
    config.vocab_size = AutoConfig.from_pretrained(base).vocab_size
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 9}]
    line = json.dumps({"id": "", "source": "s", "messages": turns}) + "\n"
    for name, times in (("train.json", 9), ("eval.json", 2)):
        (tmp_path / name).write_text(line * times)
    settings = {"model_name_or_path": base, "data_path": tmp_path / "train.json", "output_dir": tmp_path / "run"}
    settings |= {"eval_data_path": tmp_path / "eval.json", "max_steps": 2, "logging_steps": 1, "max_new_tokens": 2}
    settings |= {"num_reply_prompts": 0, "cache_dir": tmp_path / "cache", "gradient_accumulation_steps": 2}
    train.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    logged = [entry["router_loss"] for entry in record["log_history"] if "router_loss" in entry]
    assert len(logged) == 2 and all(1.9 < value < 3 for value in logged)  # 2 of 8 experts, evenly: 2
    assert record["metrics"]["router_loss"] == logged[-1]
    evaluated = [entry for entry in record["log_history"] if "eval_loss" in entry]
    assert evaluated[-1]["eval_tokens"] > 0 and "eval_router_loss" not in evaluated[-1]


def test_a_rank_without_a_row_since_the_last_log_line_gathers_router_losses_with_the_others():
    """The last update of an epoch may have fewer rows than ranks; a rank that left out the exchange hung the run."""
    other = RouterLosses()
    other.add({"router_loss": torch.tensor(2.0)})
    other.add({"router_loss": torch.tensor(3.0)})
    idle = RouterLosses()
    idle.add({})
    assert idle.take_mean(lambda mine: [mine, other.read_sums()]) == {"router_loss": 2.5}
    assert idle.take_mean(lambda mine: [mine, {}]) == {}


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_clipping_in_the_optimizer_makes_the_update_of_torchs_clipping(size):
    layers = [torch.nn.Linear(4, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1e-3, fused=True) for layer in layers]
    norms = []
    for step in range(2):
        gradients = [torch.full_like(weight, size * (step + 1)) for weight in layers[0].parameters()]
        for layer in layers:
            for weight, gradient in zip(layer.parameters(), gradients, strict=True):
                weight.grad = gradient.clone()
        norms += [torch.nn.utils.clip_grad_norm_(layers[0].parameters(), 1.0), clip_in_optimizer(optimizers[1], 1.0)]
        for optimizer in optimizers:
            optimizer.step()
    assert norms[0] == norms[1] and norms[2] == norms[3]
    for found, expected in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_an_optimizer_that_is_not_fused_is_clipped_by_torch():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    assert clip_in_optimizer(torch.optim.AdamW([weight], fused=False), 1.0) is None
    assert clip_in_optimizer(torch.optim.SGD([weight], fused=True), 1.0) is None
