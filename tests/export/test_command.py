"""The command `python -m sft.export`: its targets, its defaults, and one line for each mistake."""

import json
import shutil

import pytest

from sft.export.command import _check_shard_size, main


def test_an_existing_file_is_not_overwritten(trained, tmp_path):
    for target in ("merged", "gguf", "modelfile", "tokenizer-v4"):
        with pytest.raises(SystemExit, match="exists; name a new folder"):
            main(["--model_path", trained("qwen2"), "--to", target, "--output_dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_largest_file_of_weights_is_that_of_training(trained, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr("sft.export.command.export_merged", lambda *_paths, **options: limits.append(options))
    given = ["--model_path", trained("qwen2"), "--output_dir", str(tmp_path / "new")]
    main(given)
    main([*given, "--max_shard_size", "1MB", "--dtype", "bfloat16"])
    assert limits == [
        {"dtype": "float32", "max_shard_size": "5GB"},
        {"dtype": "bfloat16", "max_shard_size": "1MB"},
    ]


@pytest.mark.parametrize("size", ["5GB", "0.5gb", "500 MB", "1TB"])
def test_sizes_of_transformers_are_taken(size):
    assert _check_shard_size(size) is None


def test_shards_are_as_large_as_the_flag_says(trained, tmp_path, capsys):
    given = ["--model_path", trained("qwen2"), "--max_shard_size", "200KB", "--dtype", "bfloat16"]
    main([*given, "--output_dir", str(tmp_path / "merged")])
    shards = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'merged'}: the same logits\n")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model_path", "nowhere/x/y"], "no such folder"),
        (["--to", "modelfile"], "Ollama imports full models of type llama and qwen2 only; use --gguf FILE"),
        (["--to", "modelfile", "--gguf", "no.gguf"], "--gguf no.gguf: no such file"),
        (["--to", "gguf"], "--to gguf needs --llama_cpp"),
        (["--max_shard_size", "large"], "--max_shard_size large: use a size such as 5GB or 500MB"),
        (["--max_shard_size", "0GB"], "--max_shard_size 0GB: use a size such as 5GB or 500MB"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, flags, problem):
    with pytest.raises(SystemExit, match=problem) as stopped:
        main(["--model_path", trained("bloom"), "--output_dir", str(tmp_path / "new"), *flags])
    assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_its_base_is_named_before_any_work(adapter, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"its base .*gone is not there; put it back, or write its new path into"):
        main(["--model_path", str(folder), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_flag_of_another_target_is_named(trained, tmp_path, capsys):
    given = ["--model_path", trained("qwen2"), "--to", "tokenizer-v4", "--output_dir", str(tmp_path / "new")]
    main([*given, "--dtype", "bfloat16", "--outtype", "q8_0"])
    assert "note: --to tokenizer-v4 does not use --dtype, --outtype\n" in capsys.readouterr().out


def test_a_modelfile_names_its_weights(trained, tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    given = ["--model_path", trained("bloom"), "--to", "modelfile", "--gguf", str(tmp_path / "m.gguf")]
    main([*given, "--output_dir", str(tmp_path / "ollama")])
    assert (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8").startswith(f"FROM {tmp_path / 'm.gguf'}\n")
    main(["--model_path", trained("qwen2"), "--to", "modelfile", "--output_dir", str(tmp_path / "folder")])
    assert f"FROM {trained('qwen2')}\n" in (tmp_path / "folder" / "Modelfile").read_text(encoding="utf-8")
    assert f"ollama create NAME -f {tmp_path / 'ollama' / 'Modelfile'}" in capsys.readouterr().out
