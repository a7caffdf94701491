"""A model's shape from its config alone, on the meta device; and how a step and a run are laid out over GPUs."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sft.model.adapters import plan_adapters
from sft.model.shrink import not_sharded
from sft.train.callbacks import find_widths

# methods
FULL = "all weights"
LORA = "LoRA"
QLORA = "QLoRA"
# launchers
ONE = "one process"
ZERO2 = "ZeRO-2"
ZERO3 = "ZeRO-3"
WRONG_CONFIG = (ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Shape:
    """Counts of a model's parameters; `linear` are the parameters of linear layers without the head."""

    config: object = field(compare=False)
    described: str  # the config as JSON, which tells shapes apart
    parameters: int
    linear: int
    adapters: object  # a Plan of sft.model.adapters
    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    widths: tuple[int, ...] = ()  # numbers a token that checkpointed layers may keep beside their inputs
    trusted: bool = False  # its code came with it

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Step:
    """One forward and backward on one GPU: `rows` of `length` tokens, `trained` of them in the loss, and how."""

    rows: int = 1
    length: int = 2048
    trained: int = 2048
    documents: tuple[int, ...] = ()  # lengths of the conversations in the batch; empty: one in each row
    packing: bool = True
    checkpointing: bool = True
    accumulation: int = 1
    half: bool = True  # bf16 or fp16 computing
    lora_rank: int = 16
    lora_variant: str = "lora"
    lora_dropout: float = 0.0
    lora_token_rows: int = 0  # of embedding and head each, trained beside the adapters
    device: str = "cuda"
    shared: int = 1  # GPUs that share each row
    keeps_in: int = 0  # bytes of the GPU in which checkpointed layers keep more than their inputs; 0 if they don't
    activation_offload: bool = False  # layer inputs in the machine's memory between forward and backward

    @property
    def tokens(self) -> int:
        """Tokens of a forward on one GPU."""
        return -(-self.rows * self.length // self.shared)


@dataclass(frozen=True)
class Plan:
    """How the weights are trained, and over how many GPUs they are spread."""

    method: str = FULL
    launcher: str = ONE
    offload: bool = False
    gpus: int = 1

    def __str__(self) -> str:
        launcher = f"{self.launcher} with offload" if self.offload else self.launcher
        return f"{self.method}, {launcher}"


@dataclass(frozen=True)
class Part:
    """A number of bytes of one GPU (or of the machine's memory), and where it comes from."""

    name: str
    bytes: int
    formula: str


def read_shape(
    config, *, trust_remote_code: bool = False, variant: str = "lora", router: bool = False, dropout: float = 0.0
) -> Shape:
    """Build the model of a config on the meta device, and count; raises ValueError for one that can't be built.

    `variant`, `router` and `dropout` are those of the adapters that LoRA would train.
    """
    try:
        with torch.device("meta"), not_sharded():
            model = build_model(config, torch.float32, trust_remote_code)
    except WRONG_CONFIG as error:
        raise ValueError(
            f"{getattr(config, 'model_type', '?')}: no model can be built from this config: {error}"
        ) from None
    head = model.get_output_embeddings()
    text = config.get_text_config()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    rows, size = model.get_input_embeddings().weight.shape
    return Shape(
        config=config,
        described=config.to_json_string(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linear),
        adapters=plan_adapters(model, variant=variant, router=router, dropout=dropout),
        layers=text.num_hidden_layers,
        hidden=size,
        vocabulary=rows,
        tied=bool(text.tie_word_embeddings),
        widths=tuple(find_widths(model)),
        trusted=trust_remote_code,
    )


def build_model(config, dtype, trust_remote_code: bool):
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
