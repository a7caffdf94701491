"""Flags of train.py: every mistake is said before anything is loaded, a line each."""

import json
from dataclasses import dataclass, fields

import pytest
import torch

import train
from sft.train import arguments
from sft.train.arguments import OF_TRANSFORMERS, Settings, fail, flag, is_within, parse_arguments
from sft.train.checks import (
    GIB,
    NEEDS,
    NO_EFFECT,
    check_checkpointing,
    check_held_out_metrics,
    check_quantised,
    parse_gpu,
)
from tests.train.test_train import data  # noqa: F401 (a fixture)


def problems_of(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()  # a tiny base that is built in this test prints its progress
    with pytest.raises(SystemExit) as exit_:
        train.main(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()


def flags_of(base, data_path, output_dir) -> tuple[str, ...]:
    return ("--model_name_or_path", str(base), "--data_path", str(data_path), "--output_dir", str(output_dir))


def test_all_mistakes_are_said_at_once_each_in_a_line(capsys, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    lines = problems_of(
        capsys,
        *("--model_name_or_path", str(tmp_path / "nowhere"), "--data_path", str(tmp_path / "none.json")),
        *("--output_dir", str(tmp_path / "run"), "--chat_format", "vicuna", "--max_length", "0"),
        *("--deepspeed", str(tmp_path / "bad.json"), "--dtype", "bfloat16", "--learnig_rate", "1"),
    )
    expected = [
        "train.py: unknown argument --learnig_rate",
        "train.py: --max_length 0: must be at least 1",
        f"train.py: {tmp_path}/nowhere: no such folder; name a local model folder or a hub model (owner/name)",
        "train.py: --dtype bfloat16: full fine-tuning of bfloat16 weights rounds AdamW's updates away; leave "
        "--dtype at auto (fp32 masters, --bf16 for the computing), or add --lora",
        f"train.py: --data_path {tmp_path}/none.json: no such file or folder, and as a glob it matches no data file",
        "train.py: --chat_format vicuna: use one of auto, blossom, chatml, alpaca, mistral, base",
    ]
    assert [line for line in lines if line in expected] == expected
    assert any(line.startswith(f"train.py: --deepspeed {tmp_path}/bad.json: not valid JSON") for line in lines)
    assert len(lines) == len(expected) + 1


def test_a_path_that_can_not_exist_is_named_with_its_flag(capsys, tmp_path):
    name, path = "x" * 300, "/".join(["d" * 200] * 25)
    lines = problems_of(
        capsys,
        *("--model_name_or_path", name, "--data_path", "a.json", name, "--eval_data_path", path, "--replay_path", path),
        *("--output_dir", path, "--cache_dir", name, "--resume_from_checkpoint", path),
    )
    given = {"data_path": name, "eval_data_path": path, "replay_path": path, "model_name_or_path": name}
    given |= {"cache_dir": name, "output_dir": path, "resume_from_checkpoint": path}
    assert lines == [f"train.py: --{flag} {value[:80]}: File name too long" for flag, value in given.items()]


def test_a_cache_folder_that_is_a_file_and_an_encoding_of_no_files_are_refused(
    capsys,
    tiny_base,
    data,  # noqa: F811
    tmp_path,
):
    (tmp_path / "file").write_text("")
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    assert problems_of(capsys, *base, "--cache_dir", str(tmp_path / "file" / "cache"), "--encoding", "idna") == [
        f"train.py: --cache_dir {tmp_path}/file/cache: {tmp_path}/file can't be written to",
        "train.py: --encoding idna: no encoding of files; use utf-8, gb18030, big5, utf-16 or the like",
    ]


def test_values_of_a_wrong_type_are_said_together(capsys, tiny_base, data, tmp_path):  # noqa: F811
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    lines = problems_of(capsys, *base, "--learning_rate", "abc", "--max_length", "xyz", "--lr", "3")
    assert lines == [
        "train.py: --learning_rate/--learning-rate: invalid float value: 'abc'",
        "train.py: --max_length/--max-length: invalid int value: 'xyz'",
        "train.py: unknown argument --lr",
    ]


def test_a_checkpoint_that_is_not_there_is_said_before_anything_is_loaded(capsys, tiny_base, data, tmp_path):  # noqa: F811
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    (line,) = problems_of(capsys, *base, "--resume_from_checkpoint", "/nowhere")
    assert line.startswith("train.py: --resume_from_checkpoint /nowhere: not there")


def test_missing_arguments_are_named(capsys):
    assert problems_of(capsys) == [
        "train.py: --model_name_or_path is required",
        "train.py: --data_path is required",
        "train.py: --output_dir is required",
    ]


def test_a_folder_with_somebodys_files_is_not_written_to(capsys, tiny_base, data, tmp_path):  # noqa: F811
    (tmp_path / "thesis.txt").write_text("precious")
    (line,) = problems_of(
        capsys,
        *("--model_name_or_path", str(tiny_base("qwen2")), "--data_path", str(data), "--output_dir", str(tmp_path)),
    )
    assert line.startswith(f"train.py: --output_dir {tmp_path}: is not empty, and nothing in it will be overwritten")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_fp16_on_a_cpu_and_flags_that_transformers_refuses_are_one_line(capsys, tiny_base, data, tmp_path):  # noqa: F811
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    if not torch.cuda.is_available():
        assert problems_of(capsys, *base, "--fp16", "true") == [
            "train.py: --fp16 needs a GPU; a CPU ignores it without a warning. Use --bf16, or neither for fp32"
        ]
        assert problems_of(capsys, *base, "--use_liger_kernel", "true") == [
            "train.py: --use_liger_kernel: its kernels are Triton's and need a GPU; leave the flag out"
        ]
    assert len(problems_of(capsys, *base, "--eval_strategy", "sometimes")) == 1
    assert len(problems_of(capsys, *base, "--max_steps", "many")) >= 1


@pytest.mark.parametrize(
    ("value", "limits", "found"),
    [
        (1, {"at_least": 1}, True),
        (0, {"at_least": 1}, False),
        (0.0, {"above": 0}, False),
        (float("inf"), {"above": 0}, False),
        (float("nan"), {"at_least": 0, "at_most": 1}, False),
        (1.0, {"at_least": 0, "at_most": 1}, True),
        (1.0, {"at_least": 0, "below": 1}, False),
    ],
)
def test_a_value_is_compared_with_the_limits_of_its_flag(value, limits, found):
    assert is_within(value, limits) == found


def test_limits_of_shares_and_of_flags_of_transformers_are_said(capsys, tiny_base, data, tmp_path):  # noqa: F811
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    wrong = ("--max_lost", "1.5", "--learning_rate", "0", "--per_device_eval_batch_size", "0", "--rank_timeout", "-1")
    assert problems_of(capsys, *base, *wrong, "--num_reply_prompts", "-1") == [
        "train.py: --max_lost 1.5: must be at least 0 and at most 1",
        "train.py: --num_reply_prompts -1: must be at least 0",
        "train.py: --learning_rate 0.0: must be above 0",
        "train.py: --per_device_eval_batch_size 0: must be at least 1",
        "train.py: --rank_timeout -1.0: must be above 0",
    ]


def test_numbers_that_transformers_reads_as_off_or_fails_on_late_are_refused(capsys, tiny_base, data, tmp_path):  # noqa: F811
    base = flags_of(tiny_base("qwen2"), data, tmp_path / "r")
    off = {"max_grad_norm": "nan", "save_total_limit": "0", "logging_steps": "-1", "save_steps": "-1", "max_steps": "0"}
    late = {"seed": "-1", "weight_decay": "nan", "neftune_noise_alpha": "-5", "warmup_steps": "nan"}
    late |= {"dataloader_num_workers": "-1", "dataloader_prefetch_factor": "0", "eval_accumulation_steps": "0"}
    odd = {"label_smoothing_factor": "2", "lora": "true", "lora_dropout": "1"}
    given = {**off, **late, **odd}
    lines = problems_of(capsys, *base, *(word for name, value in given.items() for word in (f"--{name}", value)))
    assert {line.split()[1].removeprefix("--") for line in lines} == given.keys() - {"lora"}
    assert "train.py: --max_steps 0: trains nothing; give a number above 0, or leave it out" in lines
    assert "train.py: --lora_dropout 1.0: must be at least 0 and below 1" in lines


def test_a_resume_must_match_in_the_flags_that_change_what_is_computed():
    """As checkpoints of 37c5ef9 hold them: other fields would not be found in those, and missing ones be refused."""
    names = {entry.name for group in (train.ModelArguments, train.DataArguments) for entry in fields(group)}
    names |= {entry.name for entry in fields(train.TrainingArguments)}
    same = {
        *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "max_length", "packing", "encoding"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
        *("neftune_noise_alpha", "bf16", "fp16", "tf32", "dtype", "attn_implementation", "use_liger_kernel"),
        *("lora", "lora_rank", "lora_alpha", "lora_dropout", "load_in_4bit", "replay_share"),
    }
    settings = Settings(train.ModelArguments(), train.DataArguments(), train.TrainingArguments(use_cpu=True))
    assert set(settings.same_on_resume()) == same & names
    assert set(OF_TRANSFORMERS) <= names


def test_a_new_flag_needs_its_field_alone(capsys, tiny_base, data, tmp_path):  # noqa: F811
    @dataclass
    class More(train.DataArguments):
        num_hints: int = flag(3, "Hints that are shown.", at_least=1, resume="same")

    groups = (train.ModelArguments, More, train.TrainingArguments)
    words = [*flags_of(tiny_base("qwen2"), data, tmp_path / "r"), "--num_hints"]
    settings = parse_arguments(groups, [*words, "2"])
    assert settings.data.num_hints == settings.same_on_resume()["num_hints"] == 2
    with pytest.raises(SystemExit):
        parse_arguments(groups, [*words, "0"])
    assert capsys.readouterr().err == "train.py: --num_hints 0: must be at least 1\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("80GB×8", (80 * GIB, 8)),
        ("80GBx8", (80 * GIB, 8)),
        ("24GB", (24 * GIB, 1)),
        ("24 GiB x 2", (24 * GIB, 2)),
        ("512MB", (2**29, 1)),
    ],
)
def test_a_gpu_is_read_as_people_write_it(text, found):
    assert parse_gpu(text) == found


@pytest.mark.parametrize("text", ["", "A100", "80", "0GB", "80GBx0", "80GB8"])
def test_a_device_that_is_no_gpu_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match="write the memory of a GPU and their number, as in 80GBx8"):
        parse_gpu(text)


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("template_kwargs", "[1]", "--template_kwargs [1]: write a JSON object"),
        ("template_kwargs", "{thinking", "--template_kwargs {thinking: write a JSON object"),
        ("train_turns", "first", "--train_turns first: use one of all, last"),
    ],
)
def test_a_wrong_value_for_the_chat_template_is_one_line(flag, value, problem, tiny_base, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('[{"instruction": "a", "output": "b"}]')
    given = {"model_name_or_path": tiny_base("qwen2"), "data_path": file, "output_dir": tmp_path / "run", flag: value}
    with pytest.raises(SystemExit):
        train.parse_arguments(
            (train.ModelArguments, train.DataArguments, train.TrainingArguments),
            [text for name, argument in given.items() for text in (f"--{name}", str(argument))],
        )
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--report_to wandb", "--report_to wandb: WandbCallback requires wandb to be installed"),
        ("--report_to nonsense", "--report_to nonsense: nonsense is not supported, only "),
        ("--optim galore_adamw", "--optim galore_adamw: You need to install `galore_torch`"),
        ("--optim stable_adamw --optim_args x", "--optim stable_adamw --optim_args x: "),
        ("--adam_beta1 2", "--optim adamw_torch_fused: Invalid beta parameter at index 0: 2.0"),
        (
            "--lr_scheduler_type cosine_with_min_lr",
            "--lr_scheduler_type cosine_with_min_lr: One of min_lr or min_lr_rate",
        ),
        (
            "--lr_scheduler_type warmup_stable_decay",
            "--lr_scheduler_type warmup_stable_decay: get_wsd_schedule() missing",
        ),
        ("--metric_for_best_model accuracy", "--metric_for_best_model accuracy: use loss, perplexity, token_accuracy"),
        (
            "--metric_for_best_model loss --eval_strategy no",
            "--metric_for_best_model loss: --eval_strategy no measures",
        ),
        ("--do_train false", "--do_train false: train.py always trains"),
        ("--do_predict", "--do_predict true: train.py predicts nothing"),
        ("--fsdp full_shard", "--fsdp full_shard: checkpoints of train.py are plain or DeepSpeed's; use --deepspeed"),
        ("--sequence_parallel_size 0", "--sequence_parallel_size 0: must be at least 1"),
        ("--sequence_parallel_size 2", "--sequence_parallel_size 2: works with --deepspeed ds_zero2.json or ds_zero3"),
        (
            "--sequence_parallel_size 2 --deepspeed ds_zero3.json --packing false",
            "--sequence_parallel_size 2: only packed rows are shared; leave out --packing false",
        ),
        (
            "--sequence_parallel_size 2 --deepspeed ds_zero3.json --average_tokens_across_devices false",
            "--sequence_parallel_size 2: needs one mean over all processes; leave out --average_tokens_across_devices",
        ),
        (
            "--sequence_parallel_size 2 --deepspeed ds_zero3.json --neftune_noise_alpha 5",
            "--sequence_parallel_size 2: --neftune_noise_alpha scales by the length of whole rows",
        ),
        ("--activation_offload", "--activation_offload: moves what checkpointing keeps; add --gradient_checkpointing"),
        ("--push_to_hub --hub_strategy checkpoint", "--hub_strategy checkpoint: the model is pushed once"),
        ("--optim_args foo=1", "--optim_args foo=1: --optim adamw_torch_fused doesn't read it"),
        ("--optim sgd --optim_target_modules q_proj", "--optim_target_modules: --optim sgd doesn't read it"),
        ("--torch_compile_mode max-autotune", "--torch_compile_mode max-autotune: the parts that are compiled are"),
        (
            '--gradient_checkpointing --gradient_checkpointing_kwargs {"a":1}',
            "--gradient_checkpointing_kwargs: no option",
        ),
        ("--include_num_input_tokens_seen some", "--include_num_input_tokens_seen some: use all, non_padding or no"),
        ("--max_shard_size huge", "--max_shard_size huge: write a size, as in 5GB or 500MB"),
        ("--save_strategy best", "--save_strategy best: add --metric_for_best_model"),
        ("--debug tpu_metrics_debug", "--debug tpu_metrics_debug: is for TPUs"),
        (
            "--dataloader_num_workers 0 --dataloader_multiprocessing_context spawn",
            "--dataloader_multiprocessing_context",
        ),
        ("--lora_rank 4", "--lora_rank: has no effect without --lora; add that"),
        ("--run_name mine", "--run_name: has no effect without --report_to"),
        ("--eval_steps 5", "--eval_steps: has no effect without --eval_strategy"),
        ('--accelerator_config {"split_batches":true}', "--accelerator_config"),
        ("--eval_do_concat_batches false", "--eval_do_concat_batches false: the metrics of train.py are summed"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry_run"]])
def test_all_that_flags_alone_show_is_said_before_anything_is_loaded(
    capsys,
    tiny_base,
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    flags,
    start,
    mode,
):
    monkeypatch.setattr("sft.train.setup.load_renderer", lambda *_, **__: pytest.fail("something was loaded"))
    (line,) = problems_of(capsys, *flags_of(tiny_base("qwen2"), data, tmp_path / "r"), *flags.split(), *mode)
    assert line.startswith(f"train.py: {start}")


# Flags of transformers that a run honours: tried away from their defaults, or read in transformers (dev/LOG.md).
HONOURED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_kwargs optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 tf32 activation_checkpointing gradient_checkpointing torch_compile
    use_liger_kernel liger_kernel_config neftune_noise_alpha
    torch_empty_cache_steps logging_strategy logging_first_step log_on_each_node log_level log_level_replica
    disable_tqdm report_to eval_strategy eval_delay per_device_eval_batch_size eval_on_start eval_accumulation_steps
    save_only_model save_strategy save_steps push_to_hub hub_token load_best_model_at_end metric_for_best_model
    full_determinism seed data_seed use_cpu parallelism_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor train_sampling_strategy ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed debug
    skip_memory_metrics resume_from_checkpoint local_rank
"""


def test_each_flag_of_transformers_is_honoured_or_refused():
    """A flag that a later transformers adds has to be tried before it may pass."""
    ours = {name for name in vars(train.TrainingArguments)["__annotations__"]}
    of_transformers = {entry.name for entry in fields(train.TrainingArguments) if entry.init} - ours
    assert of_transformers - set(HONOURED.split()) - {*NO_EFFECT, *NEEDS} == set()


@pytest.mark.parametrize(
    ("flags", "num_held_out", "problem"),
    [
        ({"load_best_model_at_end": True}, 0, "--load_best_model_at_end: needs held-out data; give --eval_data_path"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 0, "--lr_scheduler_type: needs held-out data"),
        ({"metric_for_best_model": "eval_loss/c"}, 9, "loss/c: no such source is held out; use loss, loss/a, loss/b"),
    ],
)
def test_a_flag_that_needs_held_out_data_or_a_source_is_refused_without_it(flags, num_held_out, problem):
    given = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": None, **flags}
    training = train.TrainingArguments(output_dir="r", use_cpu=True, **given)
    with pytest.raises(ValueError) as refused:
        check_held_out_metrics(training, ["a", "b"], num_held_out=num_held_out)
    assert problem in str(refused.value)
    training.metric_for_best_model = "eval_loss/b"
    check_held_out_metrics(training, ["a", "b"], num_held_out=9)


@pytest.mark.parametrize(("metric", "is_greater_better"), [("perplexity", False), ("eval_token_accuracy", True)])
def test_the_best_checkpoint_has_the_lowest_perplexity_or_the_highest_accuracy(
    tiny_base,
    data,  # noqa: F811
    tmp_path,
    metric,
    is_greater_better,
):
    groups = (train.ModelArguments, train.DataArguments, train.TrainingArguments)
    words = [*flags_of(tiny_base("qwen2"), data, tmp_path / "r"), "--metric_for_best_model", metric]
    assert parse_arguments(groups, words).training.greater_is_better is is_greater_better


def test_reentrant_checkpointing_of_shared_keys_and_values_is_refused(tmp_path):
    from transformers import Gemma3nTextConfig

    Gemma3nTextConfig(num_kv_shared_layers=10).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_reentrant gives gemma3n_text a wrong gradient"):
        check_checkpointing(str(tmp_path), {"use_reentrant": True})
    check_checkpointing(str(tmp_path), {"use_reentrant": False})
    check_checkpointing(str(tmp_path), None)
    Gemma3nTextConfig(num_kv_shared_layers=0).save_pretrained(tmp_path)
    check_checkpointing(str(tmp_path), {"use_reentrant": True})


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], "auto"),
        (["--fused_kernels", "none"], "none"),
        (["--torch_compile", "true"], "compile"),
    ],
)
def test_flags_of_torch_compile_are_read_as_fused_kernels(words, chosen, tiny_base, data, tmp_path):  # noqa: F811
    """transformers' own compiling would compile a graph for each batch."""
    groups = (train.ModelArguments, train.DataArguments, train.TrainingArguments)
    training = parse_arguments(groups, [*flags_of(tiny_base("qwen2"), data, tmp_path / "r"), *words]).training
    assert (training.fused_kernels, training.torch_compile) == (chosen, False)


def test_quantised_weights_are_trained_under_adapters_alone(tmp_path):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    for method in ("gptq", "awq", "bitsandbytes", "fp8", "hqq"):
        quantised = {"quant_method": method, "bits": 4, "load_in_4bit": True}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
        with pytest.raises(
            ValueError, match=rf"its weights are quantised \({method}\), so only adapters can be trained"
        ):
            check_quantised(str(tmp_path))
    loadable = (
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8", "dequantize": True},
        {"quant_method": "compressed-tensors"},
    )
    for further in ({}, *({"quantization_config": stored} for stored in loadable)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **further}))
        check_quantised(str(tmp_path))


@pytest.mark.parametrize(
    ("printed_by", "rank", "local_rank", "printed"),
    [
        ("machines", "0", "0", "train.py: no such file\n"),
        ("machines", "8", "0", "train.py: rank 8: no such file\n"),
        ("machines", "1", "1", ""),
        ("first rank", "8", "0", ""),
        ("all", "1", "1", "train.py: rank 1: no such file\n"),
    ],
)
def test_a_problem_of_one_machine_alone_is_printed(printed_by, rank, local_rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(arguments, "wait_for_first_rank", lambda: False)
    with pytest.raises(SystemExit):
        fail(["no such file"], printed_by=printed_by)
    assert capsys.readouterr().err == printed


def test_a_problem_that_the_first_rank_does_not_have_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(arguments, "wait_for_first_rank", lambda: True)
    with pytest.raises(SystemExit):
        fail(["no such file"])
    assert capsys.readouterr().err == "train.py: rank 1: no such file\n"


def test_locks_of_killed_compilations_are_removed_under_any_launcher(tmp_path, tiny_base, data, monkeypatch):  # noqa: F811
    done = []

    def stop() -> None:
        raise ValueError("the processes would be started here")

    monkeypatch.setattr(arguments, "remove_dead_build_locks", lambda: done.append("locks"))
    monkeypatch.setattr(arguments, "complete_single_process", stop)
    with pytest.raises(SystemExit):
        train.main([*flags_of(tiny_base("qwen2"), data, tmp_path / "run"), "--deepspeed", "ds_zero2.json"])
    assert done == ["locks"]
