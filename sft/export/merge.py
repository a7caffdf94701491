"""Merge a LoRA adapter into its base in fp32, or rewrite a full model in another precision or in other shards.

The written folder is loaded again, and its logits are compared with those of the model in memory.
"""

from pathlib import Path

from sft.base import ADAPTER, RUN_RECORD
from sft.chat.reply import Chat, load_chat
from sft.checkpoint.weights import saved_shapes, verify_saved
from sft.export.output import stage_output
from sft.files import MAX_SHARD_SIZE, write_json
from sft.format.contract import check_saved, own_chat_template, saved_run
from sft.model.load import check_rows, set_generation_config

PRECISIONS = ("float32", "bfloat16", "float16")
# Adding fp32 weights in another order moves logits by rounding, by less than this.
MAX_LOGIT_DIFFERENCE = 1e-3
QUESTION = [{"role": "user", "content": "你好, hello: 1+1=?"}]


def is_adapter(model_path: str) -> bool:
    return (Path(model_path) / ADAPTER).is_file()


def export_merged(
    model_path: str, output_dir: str, *, dtype: str = PRECISIONS[0], max_shard_size: str = MAX_SHARD_SIZE
) -> Path:
    """Write the model of `model_path`, with its adapter merged if it has one, to the new folder `output_dir`.

    `max_shard_size` is the size of the largest file of weights. Raises ValueError when the merged model's logits differ
    from the adapter's, or the written model's from the merged model's.
    """
    with stage_output(output_dir) as staged:
        chat = load_whole(model_path)
        if is_adapter(model_path):
            expected = compute_logits(chat)
            chat.model = chat.model.merge_and_unload(safe_merge=True)
            _check_logits(chat, expected, "the merged model's logits differ from the adapter's")
        _write_model(chat, staged, dtype, max_shard_size)
        expected = compute_logits(chat)
        chat.model = None  # one copy in memory at a time
        written = load_chat(str(staged), device="cpu", dtype="float32")
        _check_logits(written, expected, "the written model's logits differ from those of the model in memory")
        has_template = own_chat_template(chat.renderer.tokenizer) is not None
        if has_template and (problems := check_saved(written.renderer.tokenizer, chat.renderer)):
            raise ValueError(f"the written tokenizer is another one: {'; '.join(problems[:3])}; no folder was written")
    return Path(output_dir)


def load_whole(model_path: str) -> Chat:
    """Load a model in fp32 on the CPU; ValueError where its tokenizer's control tokens have no embedding rows."""
    chat = load_chat(model_path, device="cpu", dtype="float32")
    used_ids = [*chat.renderer.stop_ids, *chat.renderer.control_ids]
    check_rows(chat.model, chat.renderer.tokenizer, model_path, used_ids=used_ids, largest_id=0)
    return chat


def _write_model(chat: Chat, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Save model and tokenizer; afterwards the model in memory is fp32 again, with the rounding of the saved one."""
    import torch

    set_generation_config(chat.model, chat.renderer.tokenizer, chat.renderer.stop_ids)
    _cast_weights(chat.model, getattr(torch, dtype))
    chat.model.save_pretrained(folder, max_shard_size=max_shard_size)
    chat.renderer.tokenizer.save_pretrained(folder)
    if run := saved_run(chat.renderer.tokenizer):
        write_json(folder / RUN_RECORD, run)  # it names the chat format and its template's variables
    verify_saved(folder, saved_shapes(chat.model))
    _cast_weights(chat.model, torch.float32)


def _cast_weights(model, dtype) -> None:
    """Cast the saved tensors only: rotary frequencies are buffers that a loaded model computes again in fp32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def compute_logits(chat: Chat):
    """Return the logits (1, tokens, vocabulary) of one short prompt."""
    import torch

    with torch.inference_mode():
        return chat.model(input_ids=torch.tensor([chat.renderer.prompt(QUESTION)])).logits


def _check_logits(chat: Chat, expected, problem: str) -> None:
    difference = (compute_logits(chat) - expected).abs().max().item()
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN fails too
        raise ValueError(f"{problem} by {difference:.2g}; no folder was written")
