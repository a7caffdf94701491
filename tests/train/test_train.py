"""train.py end to end on tiny bases, and every mistake in its arguments before anything is loaded."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

import train
from sft.base import identify_base
from sft.chat.reply import load_chat
from sft.chat.sampling import GREEDY
from sft.opendata.conversation import read_conversations
from sft.train.summary import FIXED_PROMPTS, pick_questions
from tests.conftest import ROOT

QUESTIONS = {"你好": "你好！", "Hello": "Hi there.", "1+1等于几？": "2", "What is 2+2?": "**4**"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder as sft.opendata writes it: four conversations to learn, and two of them held out."""
    folder = tmp_path_factory.mktemp("opendata")
    lines = [
        {
            "id": str(i),
            "source": "test",
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
        }
        for i, (q, a) in enumerate(QUESTIONS.items())
    ]
    for name, chosen in (("train.json", lines), ("eval.json", lines[:2])):
        (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in chosen))
    return folder


def run(base, data, output, *flags: str):
    """Call train.py's main; the common flags can be overridden."""
    settings = {"--learning_rate": "5e-3", "--max_steps": "20", "--per_device_train_batch_size": "4"}
    settings |= {"--max_new_tokens": "8", "--num_reply_prompts": "4", "--disable_tqdm": "true", "--logging_steps": "5"}
    settings |= {"--eval_strategy": "steps", "--eval_steps": "10", "--cache_dir": str(output) + "-cache"}
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        settings[name] = value
    arguments = [word for pair in settings.items() for word in pair]
    train.main(["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(output), *arguments])
    return output


def test_one_conversation_and_empty_files_beside_it_train_to_the_end(tiny_base, data, tmp_path, capfd):
    (tmp_path / "train.json").write_text((data / "train.json").read_text(encoding="utf-8").splitlines()[0] + "\n")
    for name in ("eval.json", "empty.json"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_text("no data")
    output = run(tiny_base("qwen2"), tmp_path, tmp_path / "run", "--max_steps", "2")
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["ledger"]["train"]["total"]["kept"] == 1
    said = capfd.readouterr().out
    assert "no held-out data, so nothing is evaluated" in said
    assert f"data:   {tmp_path}/empty.json: holds no record" in said
    assert "saved folder: train = serve, checked on 1 conversations of the data\n" in said
    assert f"data: not read, as their names are not those of data files: {tmp_path}/notes.txt" in said


def test_a_run_trains_the_last_reply_of_each_conversation_alone(tiny_base, tmp_path, capfd):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    run(tiny_base("qwen2"), tmp_path / "data.jsonl", tmp_path / "run", "--max_steps", "1", "--train_turns", "last")
    said = capfd.readouterr().out
    assert "two" in said and "⟦" in said
    assert "⟦ two" not in said
    assert re.search("⟦ four.*⟧", said)


SWITCH_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_data_without_thoughts_turns_thinking_off_by_default(tiny_base, data, tmp_path, capfd):
    base = shutil.copytree(tiny_base("qwen2"), tmp_path / "base")
    (base / "chat_template.jinja").write_text(SWITCH_TEMPLATE)
    output = run(base, data, tmp_path / "run", "--max_steps", "1", "--chat_format", "base")
    said = capfd.readouterr().out
    assert (
        "thinking is off by default, as all trained replies lack a thought; set it in a server by "
        'chat_template_kwargs {"enable_thinking": false}\n' in said
    )
    assert json.loads((output / "run.json").read_text())["thinking"] is False
    chat = load_chat(str(output))
    prompts = [chat.prompt_ids([{"role": "user", "content": "x"}], thinking=asked) for asked in (None, False, True)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_a_saved_folder_with_another_template_is_named_and_ends_the_run(tiny_base, data, tmp_path, monkeypatch):
    save = train.Trainer.save_final

    def save_another(trainer):
        save(trainer)
        (tmp_path / "run" / "chat_template.jinja").write_text(SWITCH_TEMPLATE)

    monkeypatch.setattr(train.Trainer, "save_final", save_another)
    with pytest.raises(ValueError, match=r"run: the model is saved, but its tokenizer and chat template are not those"):
        run(tiny_base("qwen2"), data, tmp_path / "run", "--max_steps", "1")


@pytest.mark.slow
def test_each_family_learns_saves_reloads_with_transformers_alone_and_stops(family, tiny_base, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = run(tiny_base(family), data, tmp_path / "run", "--max_steps", "80")
    chat = load_chat(str(output))
    for question, answer in QUESTIONS.items():
        reply = chat.reply([{"role": "user", "content": question}], GREEDY)
        assert (reply.text, reply.ended) == (answer, True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.generation_config.eos_token_id == chat.renderer.stop_ids
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    served = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(served, skip_special_tokens=True).strip() == "Hi there."
    assert served[-1] in chat.renderer.stop_ids
    assert next(model.parameters()).dtype == torch.float32


@pytest.fixture(scope="session")
def finished(tiny_base, data, tmp_path_factory):
    """A finished run of the qwen2 base."""
    return run(tiny_base("qwen2"), data, tmp_path_factory.mktemp("runs") / "run", "--save_steps", "10")


def test_the_output_folder_holds_what_the_readme_names(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "README.md",
        "checkpoint-10",
        "checkpoint-20",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.html",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_loss.png",
    }
    assert (finished / "training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_json_tells_how_the_run_was_made_and_how_it_went(finished, data):
    record = json.loads((finished / "run.json").read_text())
    assert record["seed"] == 42
    assert record["chat_format"] == "blossom"
    assert record["versions"]["torch"] == torch.__version__
    assert list(record["data"]["train"]) == [str(data / "train.json")]
    assert len(record["data"]["train"][str(data / "train.json")]) == 64
    assert record["ledger"]["train"]["total"] == {"in": 4, "kept": 4}
    assert record["ledger"]["eval"]["total"] == {"in": 2, "kept": 2}
    metrics = record["metrics"]
    assert metrics["steps"] == 20
    assert metrics["last_loss"] < metrics["first_loss"]
    assert math.isclose(metrics["eval_perplexity"], math.exp(metrics["eval_loss"]))
    assert 0 <= metrics["eval_token_accuracy"] <= 1
    assert [reply["question"] for reply in record["replies"][:2]] == ["你好", "Hello"]


def test_the_run_page_and_the_card_show_the_same_replies_as_run_json(finished):
    from huggingface_hub import metadata_load

    record = json.loads((finished / "run.json").read_text())
    said = [entry for entry in record["log_history"] if "replies" in entry]
    assert [entry["step"] for entry in said] == [0, 10, 20]
    assert [reply["question"] for reply in said[1]["replies"]] == list(FIXED_PROMPTS)
    assert said[2]["replies"][0]["reply"] == record["replies"][0]["after"]
    assert all(entry["tokens_per_second"] > 0 for entry in record["log_history"] if "loss" in entry)
    assert record["metrics"]["mfu"] is None or torch.cuda.is_available()
    page, card = ((finished / name).read_text() for name in ("report.html", "README.md"))
    assert "Finished" in page and not re.search(r"https?:", page)
    assert metadata_load(finished / "README.md")["language"] == ["zh", "en"]
    assert record["data"]["train"].popitem()[1] in page and record["replies"][0]["after"] in card


def test_replies_at_evaluations_change_no_bit_of_the_model_and_can_be_left_out(finished, tiny_base, data, tmp_path):
    silent = run(tiny_base("qwen2"), data, tmp_path / "silent", "--eval_replies", "false")
    first, second = (load_file(folder / "model.safetensors") for folder in (finished, silent))
    assert all(torch.equal(first[name], second[name]) for name in first)
    history = json.loads((silent / "run.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "replies" in entry] == [0, 20]


def test_a_resumed_run_ends_in_the_same_bits_as_one_that_never_stopped(finished, tiny_base, data, tmp_path):
    shutil.copytree(finished / "checkpoint-10", tmp_path / "again" / "checkpoint-10")
    (tmp_path / "again" / "checkpoint-15").mkdir()
    flags = ("--save_steps", "10", "--resume_from_checkpoint", "auto")
    again = run(tiny_base("qwen2"), data, tmp_path / "again", *flags)
    first, second = (load_file(folder / "model.safetensors") for folder in (finished, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_of(finished) == losses_of(again)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["6", "7"])
def test_a_packed_run_of_several_epochs_resumes_in_the_same_bits(step, tiny_base, tmp_path):
    """Three rows an epoch: step 6 is the end of the second epoch, step 7 lies inside the third."""
    lines = [json.dumps({"prompt": f"question {i}", "completion": "answer " * (1 + i % 7)}) for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = ("--max_length", "512", "--max_steps", "10", "--per_device_train_batch_size", "1", "--save_steps", step)
    whole = run(tiny_base("qwen2"), tmp_path / "data.jsonl", tmp_path / "whole", *flags)
    assert len(json.loads((whole / "run.json").read_text())["log_history"]) > 0
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    flags += ("--resume_from_checkpoint", "auto")
    again = run(tiny_base("qwen2"), tmp_path / "data.jsonl", tmp_path / "again", *flags)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_packed_run_is_the_run_of_its_examples_unpacked(tiny_base, data, tmp_path):
    flags = ("--max_steps", "2", "--learning_rate", "1e-3")
    packed = run(tiny_base("falcon"), data, tmp_path / "packed", *flags, "--packing", "true")
    padded = run(tiny_base("falcon"), data, tmp_path / "padded", *flags, "--packing", "false")
    first, second = (load_file(folder / "model.safetensors") for folder in (packed, padded))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5


@pytest.mark.slow
def test_lora_trains_the_rows_of_untrained_control_tokens_and_merges_to_equal_logits(tiny_base, data, tmp_path):
    from sft.export.merge import export_merged

    for family in ("qwen2", "qwen3"):
        base = tiny_base(family)
        flags = ("--lora", "true", "--chat_format", "chatml", "--gradient_checkpointing", "true")
        output = run(base, data, tmp_path / family, *flags)
        merged = load_file(export_merged(str(output), str(tmp_path / f"{family}-merged")) / "model.safetensors")
        original = load_file(base / "model.safetensors")
        stop = load_chat(str(output)).renderer.stop_ids[0]
        for name in [n for n in ("model.embed_tokens.weight", "lm_head.weight") if n in original]:
            changed = (merged[name] != original[name].float()).any(dim=1)
            assert changed[stop]
            assert not changed[: stop - 2].any()
        stored = json.loads((output / "base.json").read_text())
        assert json.loads((output / "run.json").read_text())["base"] == stored == identify_base(str(base))
        settings = json.loads((output / "generation_config.json").read_text())
        assert settings["eos_token_id"] == load_chat(str(output)).renderer.stop_ids


def test_the_trainer_starts_from_fp32_masters_for_files_of_any_type(tiny_base):
    from sft.model.load import load_model

    assert {p.dtype for p in load_model(str(tiny_base("bloom"))).parameters()} == {torch.float32}


def losses_of(output) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "run.json").read_text())["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "falcon", "qwen3"])
def test_gradient_checkpointing_changes_nothing_and_bf16_hardly_anything(family, tiny_base, data, tmp_path):
    def losses(*flags):
        output = tmp_path / ("run" + "".join(flags))
        return losses_of(run(tiny_base(family), data, output, "--max_steps", "4", "--logging_steps", "1", *flags))

    plain = losses()
    assert losses("--gradient_checkpointing", "true") == plain
    assert losses("--bf16", "true") == pytest.approx(plain, abs=0.02)


@pytest.mark.slow
def test_accumulated_batches_weigh_every_trained_token_alike(tiny_base, data, tmp_path):
    """1 x 4 rows and 4 x 1 row are the same update, though the rows have different numbers of trained tokens."""
    whole = run(tiny_base("bloom"), data, tmp_path / "whole", "--max_steps", "2")
    flags = ("--max_steps", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")
    parts = run(tiny_base("bloom"), data, tmp_path / "parts", *flags)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    tokens = [json.loads((folder / "run.json").read_text())["metrics"]["tokens_seen"] for folder in (whole, parts)]
    assert tokens == [656, 656]  # 328 in each of two epochs, however they are padded


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_keeps_its_model(tiny_base, data, tmp_path):
    flags = ("--max_steps", "6", "--save_steps", "3", "--lr_scheduler_type", "constant")
    first = run(tiny_base("qwen2"), data, tmp_path / "run", *flags)
    weights = load_file(first / "model.safetensors")
    (first / "model.safetensors").unlink()
    run(tiny_base("qwen2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint", "auto")
    again = load_file(first / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert json.loads((first / "run.json").read_text())["metrics"]["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_held_out_loss_is_the_mean_over_tokens_at_any_batch_size(packing, tiny_base, tmp_path):
    lines = [json.dumps({"prompt": f"q{i}", "completion": "word " * (40 if i > 5 else 1)}) for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    found = []
    for size in ("1", "8"):
        flags = ("--eval_data_path", str(tmp_path / "eval"), "--per_device_eval_batch_size", size, "--packing", packing)
        (tmp_path / "eval").mkdir(exist_ok=True)
        (tmp_path / "eval" / "e.jsonl").write_text("\n".join(lines))
        output = run(tiny_base("bloom"), tmp_path / "data.jsonl", tmp_path / size, *flags, "--max_steps", "1")
        metrics = json.loads((output / "run.json").read_text())["metrics"]
        found.append((metrics["eval_loss"], metrics["eval_token_accuracy"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_hub_token_reaches_no_file(tiny_base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_SECRET", "--x_token=hf_SECRET"])
    monkeypatch.setenv("HF_TOKEN", "")
    output = run(tiny_base("qwen2"), data, tmp_path / "run", "--max_steps", "1", "--hub_token", "hf_SECRET")
    leaks = [path for path in output.rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
    assert leaks == []


@pytest.mark.slow
def test_the_finished_folder_is_pushed_and_no_token_stays(tiny_base, data, tmp_path, monkeypatch):
    pushed = []

    def create_repo(self, repo_id, **options):
        return type("Url", (str,), {"repo_id": repo_id})(repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        kept = [path for path in Path(folder_path).iterdir() if not path.match(ignore_patterns[0])]
        pushed.append((repo_id, {path.name for path in kept}))
        if len(pushed) == 2:
            raise OSError("503 Server Error\nRequest ID: x")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "")
    flags = ("--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps", "--push_to_hub", "true")
    flags = (*flags, "--hub_model_id", "me/mine", "--hub_token", "hf_SECRET")
    output = run(tiny_base("qwen2"), data, tmp_path / "run", *flags)
    assert [repository for repository, _names in pushed] == ["me/mine"]
    assert {"model.safetensors", "README.md", "run.json", "report.html"} <= pushed[0][1]
    assert not [name for name in pushed[0][1] if name.startswith(("checkpoint", "training_args"))]
    assert "hf_SECRET" not in "".join(map(str, pushed))
    leaks = [path for path in output.rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
    assert leaks == []
    with pytest.raises(ValueError, match="is saved, but not pushed: 503 Server Error; hf upload me/mine"):
        run(tiny_base("qwen2"), data, tmp_path / "again", *flags)
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_a_model_that_was_saved_badly_is_not_moved_into_place(tiny_base, data, tmp_path, monkeypatch):
    def refuse(folder, expected=None):
        raise ValueError("tensor a is empty")

    monkeypatch.setattr("sft.train.trainer.verify_saved", refuse)
    with pytest.raises(ValueError, match="tensor a is empty"):
        run(tiny_base("qwen2"), data, tmp_path / "run", "--max_steps", "1")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_without_a_model(tiny_base, data, tmp_path):
    with pytest.raises(ValueError, match=r"step \d: the loss is nan on rank 0, in example .*no model saved"):
        run(tiny_base("qwen2"), data, tmp_path / "run", "--learning_rate", "1e30", "--logging_steps", "1")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_questions_come_evenly_from_every_file_with_their_answers(data):
    questions = pick_questions([str(data / "train.json")], 2)
    assert questions[:2] == [("你好", ["你好！"]), ("Hello", ["Hi there."])]
    assert questions[2:] == [("写一首关于春天的诗", []), ("What is the capital of France?", []), ("1+1等于几？", ["2"])]


@pytest.mark.slow
def test_the_script_itself_fails_in_one_line_without_a_traceback(tmp_path, tiny_base):
    (tmp_path / "bad.json").write_text('{"no": "form"}\n')
    command = [sys.executable, "train.py", "--model_name_or_path", str(tiny_base("qwen2"))]
    command += ["--data_path", str(tmp_path / "bad.json"), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "train.py: no conversation to train on in" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_sample_is_read_whole_but_for_its_deliberate_dirt():
    results = list(read_conversations([str(path) for path in sorted((ROOT / "data_proj/sample").glob("*.json*"))]))
    malformed = [e.reason for _c, e, _f, _l in results if e is not None and e.reason not in ("empty", "role_order")]
    assert sorted(malformed) == ["malformed_json", "not_text"]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "expected"), [([], []), (["--lora"], ["peft"])])
def test_a_run_does_not_wait_for_packages_that_it_does_not_use(flags, expected):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{flags}, '--help']\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "import accelerate.utils, transformers.trainer\n"
        "print([name for name in ('datasets', 'deepspeed', 'peft') if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(expected)
