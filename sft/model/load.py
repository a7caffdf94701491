"""Loads the tokenizer and the model of any family: padding, precision, stop ids, adapters.

Facts about a family are read from its config and tokenizer, never from its name. torch and transformers are imported
where they are used, so that a mistake in the arguments is reported before seconds are spent on imports.
"""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from sft.base import ADAPTER, base_of_adapter

# OpenMP's idle threads spin: on a CPU that is busy with anything else too, generation took 100 times as long
# (dev/LOG.md). It must be set before torch is imported.
PASSIVE_OPENMP_WAIT = ("OMP_WAIT_POLICY", "PASSIVE")

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_model_path(path: str, names: Sequence[str] = ("config.json",)) -> str | None:
    """Return what is wrong with a model folder (it must hold one of `names`), or None; a hub name is not looked up."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / ADAPTER).is_file() and ADAPTER not in names:
            base = base_of_adapter(folder) or "its base"
            return (
                f"{path}: is a LoRA adapter of {base}, not a base; merge it (python -m sft.export --model_path {path} "
                f"--output_dir NEW) and name NEW, or continue its run with --model_name_or_path {base}, the run's "
                "--output_dir and --resume_from_checkpoint auto"
            )
        if not any((folder / name).is_file() for name in names):
            return f"{path}: no {' or '.join(names)} in this folder; name a model folder"
        return _check_base_of_adapter(path) if ADAPTER in names else None
    is_hub_name = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")
    looks_local = path.split("/")[0] and Path(path.split("/")[0]).is_dir() and "/" in path
    if is_hub_name and not looks_local:
        return None
    return f"{path}: no such folder; name a local model folder or a hub model (owner/name)"


def _check_base_of_adapter(path: str) -> str | None:
    """Return what is wrong with the base that an adapter's folder names, or None; other folders have none."""
    config = Path(path).expanduser() / ADAPTER
    base = base_of_adapter(config.parent)  # None for a full model
    if not base or not (problem := check_model_path(base)):
        return None
    if Path(base).expanduser().is_dir():
        return f"{path}: its base {problem}"
    return f"{path}: its base {base} is not there; put it back, or write its new path into {config}"


def absolute(path: str) -> str:
    """Return a local folder's absolute path, and a hub name as it is."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().is_dir() else path


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """Load the tokenizer with an existing pad token: its own, else unk, else eos; embeddings are never resized.

    Padding is masked by position and labels are made before padding, so a pad that equals eos does no harm.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception
        raise unloadable(path, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if not set(tokenizer.encode("Hello 你好", add_special_tokens=False)) - {tokenizer.unk_token_id}:
        # transformers 5 makes an empty tokenizer where the files of one are missing, and all text would be lost.
        reason = "it encodes no text at all; is tokenizer.json or tokenizer.model missing?"
        raise unloadable(path, "tokenizer", ValueError(reason))
    tokenizer.padding_side = "right"
    return tokenizer


def from_pretrained(model_class, path: str, **options):
    """Load a model; any fault of its files is raised as one ValueError that names the path.

    With `output_loading_info` it is a fault too that weights are not in the files: transformers fills them with random
    numbers. So is a missing weight of an adapter, which peft leaves without an effect.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    wrong = (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # of peft 0.21
            loaded = model_class.from_pretrained(path, **options)
    except (*wrong, SafetensorError, StrictDataclassError, UserWarning) as error:
        raise unloadable(path, "model", error) from error
    if not options.get("output_loading_info"):
        return loaded
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        reason = f"{len(missing)} of its weights are not in its files, {missing[0]} for one; fetch them again"
        raise unloadable(path, "model", ValueError(reason))
    return model


def check_weights(path: str, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError unless a local folder's files hold all weights, of the sizes that its config says.

    None is read. Hub models are not looked at, nor quantised ones, whose package may want a GPU.
    """
    from transformers import AutoModelForCausalLM

    from sft.model.shrink import not_sharded

    if not Path(path).is_dir() or hasattr(
        load_config(path, trust_remote_code=trust_remote_code), "quantization_config"
    ):
        return
    options = {"device_map": "meta", "output_loading_info": True, "trust_remote_code": trust_remote_code}
    with not_sharded():
        from_pretrained(AutoModelForCausalLM, path, **options)


def unloadable(path: str, what: str, error: Exception) -> ValueError:
    """The ValueError that says in a line why the model or tokenizer of `path` can't be loaded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return ValueError(f"{path}: the {what} can't be loaded: {reason[:300]}")


def choose_compute(*, bf16: bool, fp16: bool, use_cpu: bool = False) -> dict[str, bool]:
    """Choose the autocast type when none was asked for: bf16 where a GPU has it, fp16 where it must be, else fp32."""
    import torch

    on_gpu = torch.cuda.is_available() and not use_cpu
    if fp16 and not on_gpu:
        raise ValueError("--fp16 needs a GPU; a CPU ignores it without a warning. Use --bf16, or neither for fp32")
    if bf16 or fp16 or not on_gpu:
        return {"bf16": bf16, "fp16": fp16}
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"bf16": has_bf16, "fp16": not has_bf16}


def check_dtype(dtype: str, *, lora: bool) -> str | None:
    """Return why this dtype of the weights can't be trained, or None."""
    if dtype not in DTYPES:
        return f"--dtype {dtype}: use one of {', '.join(DTYPES)}"
    if dtype in ("bfloat16", "float16") and not lora:
        return (
            f"--dtype {dtype}: full fine-tuning of {dtype} weights rounds AdamW's updates away; leave --dtype at auto "
            "(fp32 masters, --bf16 for the computing), or add --lora"
        )
    return None


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    compute: str = "float32",
    lora: bool = False,
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
):
    """Load the base for training. Trainable weights are fp32; under LoRA the frozen base has the compute type."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = compute if lora else "float32"
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    options |= four_bit(compute) if load_in_4bit else _full_precision(path, trust_remote_code)
    model = from_pretrained(AutoModelForCausalLM, path, output_loading_info=True, **options)
    model.config.use_cache = False
    return model


def _full_precision(path: str, trust_remote_code: bool) -> dict:
    """Return what `from_pretrained` takes to unpack MXFP4 weights: the package `kernels` keeps them packed."""
    from transformers import Mxfp4Config

    stored = getattr(load_config(path, trust_remote_code=trust_remote_code), "quantization_config", None)
    is_packed = isinstance(stored, dict) and stored.get("quant_method") == "mxfp4"
    return {"quantization_config": Mxfp4Config(dequantize=True)} if is_packed else {}


def four_bit(compute: str) -> dict:
    """Return what `from_pretrained` takes to load in 4 bit; raises ValueError where that can't be."""
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ValueError("--load_in_4bit needs a CUDA GPU and bitsandbytes; leave it out on a CPU")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


# --- adapters of peft ----------------------------------------------------------------------------------------------


def repair_peft() -> None:
    """Repair peft 0.21: trained token rows lose a head's bias and an embedding's norm, exact targets are rewritten.

    Its rewriting serves adapters that were trained with transformers 4, where experts were linear layers; it takes the
    adapters of dense layers and shared experts away and gives the router one. It is left out for configs with a list of
    parameters, be it empty: older adapters have none.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import transformers_weight_conversion as conversion

    TrainableTokensLayer._collect_token_weights = _gathered_rows
    if hasattr(conversion.convert_peft_config_for_transformers, "__wrapped__"):
        return
    convert_config = conversion.convert_peft_config_for_transformers
    convert_weights = conversion.convert_peft_adapter_state_dict_for_transformers

    @functools.wraps(convert_config)
    def convert_old_config(peft_config, model, conversions):
        if getattr(peft_config, "target_parameters", None) is None:
            convert_config(peft_config, model=model, conversions=conversions)

    def convert_old_weights(*, model, peft_config, adapter_state_dict, **options):
        if getattr(peft_config, "target_parameters", None) is not None:
            return adapter_state_dict
        return convert_weights(model, peft_config, adapter_state_dict, **options)

    conversion.convert_peft_config_for_transformers = convert_old_config
    conversion.convert_peft_adapter_state_dict_for_transformers = convert_old_weights
    TrainableTokensLayer.forward_adapters = _whole_forward(TrainableTokensLayer.forward_adapters)


def _whole_forward(forward):
    """Let a layer with trained token rows do all that its own forward does: a head's bias, an embedding's norm."""
    from torch import nn
    from torch.func import functional_call

    @functools.wraps(forward)
    def forward_adapters(self, x, active_adapters, *args, **kwargs):
        base = self.base_layer
        if self.disable_adapters or not active_adapters or self.merged:
            return forward(self, x, active_adapters, *args, **kwargs)
        if isinstance(base, nn.Embedding) and type(base).forward is not nn.Embedding.forward:
            return functional_call(base, {"weight": self.get_merged_weights(active_adapters)}, (x,))
        result = forward(self, x, active_adapters, *args, **kwargs)
        bias = getattr(base, "bias", None)
        return result if bias is None else result + bias.to(result.dtype)

    return forward_adapters


def _gathered_rows(_layer, weight, rows: Sequence[int], _size: int):
    """Rows of a weight sharded by ZeRO-3. peft 0.21's own asks for a CUDA device, also on a machine without one."""
    from peft.utils.integrations import gather_params_ctx

    with gather_params_ctx([weight], modifier_rank=None):
        return weight[rows].clone()


# --- Liger's kernels ----------------------------------------------------------------------------------------------


def has_liger(model) -> bool:
    """Whether Liger is installed and has kernels for the model's family; if its import fails, using it says so."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        from liger_kernel.transformers import monkey_patch
    except Exception:  # it imports much of transformers and Triton, whose versions differ
        return True
    return family_model(model).config.model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN


def use_liger_kernels(model) -> str:
    """Put Liger's kernels for rotary positions, norms and MLP into a model that Liger supports; return what was done.

    Its fused loss is left out: it takes every position through the head, ours only those with a label. Liger 0.8 does
    nothing, without a warning, for families that it doesn't support. It also replaces names in the family's module of
    transformers, which other models of this process use: those are put back, and this model keeps its kernels.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        raise ValueError("--use_liger_kernel: pip install -r requirements-gpu.txt, or leave the flag out") from None
    from sft.model.mixers import rotate_with

    base = family_model(model)
    family = base.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"no Liger kernels: there are none for {family}"
    modules = {sys.modules[type(module).__module__] for module in base.modules()}
    before = {module: dict(vars(module)) for module in modules if module.__name__.startswith("transformers.models.")}
    rotations = {}
    try:
        monkey_patch._apply_liger_kernel_to_instance(model=base, **_liger_options(base.config))
    finally:
        for module, names in before.items():
            rotations[module] = vars(module).get("apply_rotary_pos_emb")
            vars(module).update(names)
    for module, rotate in rotations.items():
        if rotate is not vars(module).get("apply_rotary_pos_emb"):
            rotate_with(base, rotate, module.__name__)
    return f"Liger's for {family}"


def _liger_options(config) -> dict[str, bool]:
    """Return the kernels of Liger 0.8.5 that must not be used: its losses, and an MLP that computes something else.

    It never looks at the activation. For experts it tries 160 variants in each process, multiplies fp32 in TF32, sums
    in any order, and computes gradients of frozen weights.
    """
    text = config.get_text_config()
    options = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    has_experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if has_experts or activation not in ("silu", "swish"):
        options["swiglu"] = False
    if activation != "gelu_pytorch_tanh":
        options["geglu"] = False
    return options


def family_model(model):
    """Return the model of a family without its wrappers: DDP, DeepSpeed, PEFT."""
    model = getattr(model, "module", model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "module", base)


# --- made ready ----------------------------------------------------------------------------------------------------


def set_generation_config(model, tokenizer, stop_ids: Sequence[int]) -> None:
    """Save every stop id with the model, and no limits of length: a server would cut each reply, or never let it end.

    A base's own sampling settings are kept, unless they contradict each other: then saving would fail, at the end.
    """
    from transformers import GenerationConfig

    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["eos_token_id"] = list(stop_ids)
    settings = model.generation_config
    settings.update(**ids, max_new_tokens=None, max_length=None, min_new_tokens=None, min_length=None)
    settings._from_model_config = False  # transformers 5.23 may else derive the ids anew from the model's config
    try:
        settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(**ids)
    model.config.pad_token_id = tokenizer.pad_token_id


def load_config(path: str, *, trust_remote_code: bool = False):
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)


def context_window(config) -> int | None:
    """The longest text of a model in tokens; None where positions are not numbered (ALiBi)."""
    config = config.get_text_config()
    return None if getattr(config, "alibi", False) else getattr(config, "max_position_embeddings", None)


def check_window(path: str, max_length: int, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError when rows would be longer than what the model has positions for."""
    window = context_window(load_config(path, trust_remote_code=trust_remote_code))
    if window and max_length > window:
        raise ValueError(f"--max_length {max_length}: {path} has {window} positions; use at most that")


def check_rows(model, tokenizer, path: str, *, used_ids: Sequence[int], largest_id: int) -> None:
    """Raise ValueError for a token that has no embedding row; choose another pad token if it is only the pad."""
    rows = model.config.get_text_config().vocab_size
    if tokenizer.pad_token_id >= rows:
        known = [
            t for t in (tokenizer.unk_token, tokenizer.eos_token) if t and tokenizer.convert_tokens_to_ids(t) < rows
        ]
        tokenizer.pad_token = known[0] if known else tokenizer.convert_ids_to_tokens(0)
    for token_id in [*used_ids, largest_id]:
        if token_id >= rows:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise ValueError(
                f"{path}: token {token!r} has id {token_id}, but the model has {rows} embedding rows; the tokenizer in "
                "this folder is not the model's own"
            )


def count_parameters(model) -> tuple[int, int]:
    """Return (trainable, all) parameters; under ZeRO-3 a parameter's full size is counted, not this rank's share."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
