"""The same examples give the same gradient: in one batch, in parts, packed, and shared by processes, plain or ZeRO.

Each way takes all examples in each update, with plain gradient descent at a rate of 1: the weights then move by the
gradient. Examples have from 1 to 60 trained tokens, so that every part, row and process has another number of them; a
mean of means would be another gradient.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.scripts import sh

FLAGS = {"--optim": "sgd", "--lr_scheduler_type": "constant", "--warmup_steps": "0", "--learning_rate": "1"}
FLAGS |= {"--max_grad_norm": "1000", "--max_steps": "2", "--logging_steps": "1", "--save_strategy": "no"}
FLAGS |= {"--max_new_tokens": "2", "--num_reply_prompts": "1", "--disable_tqdm": "true", "--chat_format": "chatml"}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"prompt": f"question {i}", "completion": "word " * (1 + i * i % 61)}) for i in range(24)]
    (folder / "train.json").write_text("\n".join(lines))
    return folder / "train.json"


@pytest.fixture(scope="module")
def in_one_process(tiny_base, examples, tmp_path_factory):
    """Return a function that trains in this process with `size` x `steps` rows; it gives the output folder."""

    def run(size: int, steps: int, *, packing: bool = False):
        output = tmp_path_factory.mktemp("run") / "model"
        flags = {**FLAGS, "--per_device_train_batch_size": str(size), "--gradient_accumulation_steps": str(steps)}
        flags |= {"--model_name_or_path": str(tiny_base("qwen2")), "--data_path": str(examples)}
        flags |= {"--output_dir": str(output), "--packing": str(packing), "--max_length": "256"}
        flags |= {"--cache_dir": str(output) + "-cache"}
        train.main([word for pair in flags.items() for word in pair])
        return output

    return run


@pytest.fixture(scope="module")
def whole(in_one_process):
    """Gradient of one batch of all 24 examples."""
    return measured(in_one_process(24, 1))


def measured(output) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Return the losses and gradient norms of both updates, and the weights after them."""
    history = json.loads((output / "run.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2
    weights = load_file(output / "model.safetensors")
    return [entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps], weights


def count_tokens_seen(output) -> int:
    """Return how many tokens the first update took."""
    history = json.loads((output / "run.json").read_text())["log_history"]
    (seen,) = {entry["num_input_tokens_seen"] for entry in history if entry["step"] == 1 and "loss" in entry}
    return seen


def assert_same(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    assert expected[2].keys() <= found[2].keys()  # ZeRO-2 also writes a head that is tied to the embeddings
    assert max((found[2][name] - expected[2][name]).abs().max().item() for name in expected[2]) < 1e-5


@pytest.mark.parametrize(("size", "steps"), [(4, 6), (5, 5), (1, 24)])
def test_parts_give_the_gradient_of_the_whole(size, steps, in_one_process, whole):
    assert_same(measured(in_one_process(size, steps)), whole)


@pytest.mark.parametrize(("size", "steps"), [(64, 1), (1, 64)])
def test_packed_rows_give_the_gradient_of_their_examples(size, steps, in_one_process, whole):
    """64 rows are all there are."""
    output = in_one_process(size, steps, packing=True)
    assert_same(measured(output), whole)
    assert count_tokens_seen(output) == 1134


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_two_processes_give_the_gradient_of_one(zero, tiny_base, examples, whole, tmp_path):
    """Under the knobs that give one process 4 x 6 rows."""
    knobs = {"MODEL": str(tiny_base("qwen2")), "DATA": str(examples), "OUTPUT": str(tmp_path), "MAX_LENGTH": "256"}
    knobs |= {"BATCH_SIZE": "4", "ACCUMULATION": "6"}
    flags = [word for pair in (FLAGS | {"--packing": "false"}).items() for word in pair]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    if zero == "none":
        launcher = f"{sys.executable} -m sft.launch"
        done = sh("base_run.sh", *flags, **knobs, LAUNCHER=launcher, NUM_PROCESSES="2")
    else:
        done = sh("ds_all.sh", *flags, **knobs, ZERO=zero, NUM_GPUS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 24 rows (4 x 3 x 2 processes)" in done.stdout
    assert_same(measured(tmp_path / "model"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3"])
def test_processes_that_share_each_packed_row_give_the_gradient_of_one(zero, tiny_base, examples, whole, tmp_path):
    """Two rows in a batch, laid end to end: the seam of the two parts may be between rows or inside a document."""
    knobs = {"MODEL": str(tiny_base("qwen2")), "DATA": str(examples), "OUTPUT": str(tmp_path), "MAX_LENGTH": "250"}
    knobs |= {"BATCH_SIZE": "3", "ACCUMULATION": "2"}
    flags = [word for pair in FLAGS.items() for word in pair] + ["--cache_dir", str(tmp_path / "cache")]
    knobs |= {"ZERO": zero, "NUM_GPUS": "2", "SEQUENCE_PARALLEL": "2"}
    if zero == "3":
        flags += ["--gradient_checkpointing", "--activation_offload", "--save_strategy", "steps", "--save_steps", "1"]
    done = sh("ds_all.sh", *flags, **knobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 6 rows (3 x 2 x 1 groups of 2 processes)" in done.stdout
    assert "self-test: logits of a shared row are within" in done.stdout
    assert_same(measured(tmp_path / "model"), whole)
    assert count_tokens_seen(tmp_path / "model") == 1134, "as many as one process sees"
    if zero == "3":
        shutil.copytree(tmp_path / "model" / "checkpoint-1", tmp_path / "again" / "model" / "checkpoint-1")
        knobs["OUTPUT"] = str(tmp_path / "again")
        done = sh("ds_all.sh", *flags, "--resume_from_checkpoint", "auto", **knobs)
        assert done.returncode == 0, done.stderr[-3000:]
        whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
        assert all(torch.equal(again[name], weight) for name, weight in whole.items())
