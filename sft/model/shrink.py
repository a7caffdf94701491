"""Builds a tiny twin of a model: its class, a few layers of each kind, small sizes, random weights, on the CPU.

And what the proofs on twins and on real models have in common: random texts, a mode, a distance.
"""

import copy
import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

with open(Path(__file__).with_name("twin_sizes.csv"), encoding="utf-8", newline="") as stream:
    # Settings of a config that size or count something, by a pattern of their whole name: their value in a twin, and
    # whether it is the largest one. The first that matches is taken.
    SIZES = {row["setting"]: (int(row["twin"]), row["rule"] == "at most") for row in csv.DictReader(stream)}
WIDTH = SIZES["hidden_size"][0]
VOCABULARY = 512
VOCABULARY_SIZES = r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?"
TOKEN_IDS = ("token_id", "token_ids")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
LAYER_NUMBERS = r"moe_layers|.*_idxs|.*_indices|.*layer_ids|cross_attention_layers|mlp_only_layers"
DENSE_COUNTS = ("first_k_dense_replace", "num_dense_layers")  # the first layers, without experts
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
NUM_KEY_HEADS = r"(swa_|global_)?num_(global_)?key_value_heads|num_kv_heads|kv_n_heads"
PARTS = ("attn_config", "ffn_config")  # of dbrx's config


def build_twin(model_class: type, config, attn_implementation: str):
    """Return a random fp32 twin of a model on the CPU, dropout 0; the random state is left alone.

    A config that can't be shrunk raises an error of any type.
    """
    import torch

    config = without_dropout(shrink_config(config))
    config.use_cache = config.get_text_config().use_cache = False
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    return make_random(lambda: model_class._from_config(config, **options)).eval()


def make_random(make: Callable):
    """Return the model that `make` makes, on the CPU with random weights; the random state is left alone."""
    import torch

    with torch.device("cpu"), torch.random.fork_rng(devices=[]), not_sharded():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for weight in model.parameters():  # no weight is 0, and none hides what another does
                weight.add_(torch.randn_like(weight), alpha=0.05)
    return model


def describe_twin(config) -> str:
    """Return the JSON of a twin's config, which models of a family share at any depth and size."""
    try:
        small = shrink_config(config)
    except Exception:  # a config that can't be shrunk fails in many ways
        return config.to_json_string()
    small.dtype = None
    return small.to_json_string()


def build_twin_of(model):
    """Return a twin of a model, with its attention implementation."""
    implementation = model.config.get_text_config()._attn_implementation
    return build_twin(family_class(model), model.config, "sdpa" if implementation == "documents" else implementation)


def family_class(base) -> type:
    """Return the family's own class of a model, without the subclasses that this project makes of it."""
    return next(each for each in type(base).__mro__ if not each.__bases__[0].__module__.startswith("sft."))


def without_dropout(config):
    """Set every dropout and other noise of a config to 0, in place; return the config."""
    for part in (config, config.get_text_config(), *(getattr(config, name, None) for name in PARTS)):
        for name, value in part.to_dict().items() if part is not None else ():
            if ("dropout" in name or name.endswith(("pdrop", "jitter_noise"))) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


@contextmanager
def not_sharded() -> Iterator[None]:
    """Build models whole where ZeRO-3 is set up: transformers 5 would shard even a model without memory."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def shrink_config(config, *, layers_of_a_kind: int = 2, window: int = 24, keep_vocabulary: bool = False):
    """Return a config of the same type with a few layers of each kind, small sizes and windows of `window` tokens.

    With `keep_vocabulary` its token ids and embedding rows are the config's own.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    settings = text.to_dict()
    limits = {"window": window, "keep_vocabulary": keep_vocabulary}
    _shrink_part(text, settings, choose_layers(settings, layers_of_a_kind), **limits)
    for name in {*small.sub_configs, *text.sub_configs, *PARTS}:
        part = getattr(small, name, None) or getattr(text, name, None)
        if hasattr(part, "to_dict") and part is not text:
            settings = part.to_dict()
            _shrink_part(part, settings, list(range(min(2, count_layers(settings)))), **limits)
    return small


def count_layers(settings: dict) -> int:
    counts = [settings[name] for name in LAYER_COUNTS if isinstance(settings.get(name), int)]
    return counts[0] if counts else len(settings.get("layers_block_type") or ())


def choose_layers(settings: dict, most: int) -> list[int]:
    """Return the numbers of the layers that stay: the first `most` of each kind."""
    chosen = []
    seen = Counter()
    for layer, kind in enumerate(kinds_of_layers(settings)):
        seen[kind] += 1
        if seen[kind] <= most:
            chosen.append(layer)
    return chosen


def kinds_of_layers(settings: dict) -> list[str]:
    """Return a text for each layer that tells its kind, as the lists and periods of a config do."""
    count = count_layers(settings)
    if pattern := settings.get("block_types"):  # recurrent_gemma: a pattern that repeats
        return [str(layer % len(pattern)) for layer in range(count)]
    numbers = [settings[name] for name in settings if _is_layer_numbers(name, settings[name])]
    lists = [value for name, value in settings.items() if _is_by_layer(name, value, count)]
    periods = [settings[name] for name in settings if name.endswith(("_period", "_step", "_interval"))]
    periods = [] if lists else [period for period in periods if isinstance(period, int) and period > 1]
    dense = max(settings.get(name) or 0 for name in DENSE_COUNTS)
    shared = count - (settings.get("num_kv_shared_layers") or 0)
    kinds = []
    for layer in range(count):
        flags = [layer < dense, layer >= shared, *(layer in value for value in numbers)]
        kinds.append(repr([flags, [value[layer] for value in lists], [layer % period for period in periods]]))
    return kinds


def keep_layers(config, layers: list[int]) -> None:
    """Cut a config, in place, to these of its layers; all sizes stay."""
    config = config.get_text_config()
    settings = config.to_dict()
    count = count_layers(settings)
    kept = {}
    for name, value in settings.items():
        if (of_layers := _take_layers(name, value, layers, count)) is not None:
            kept[name] = of_layers
        elif name in DENSE_COUNTS and isinstance(value, int):
            kept[name] = sum(layer < value for layer in layers)
        elif name == "num_kv_shared_layers" and isinstance(value, int):
            kept[name] = sum(layer >= count - value for layer in layers)
    _set(config, settings, kept)


def _take_layers(name: str, value, layers: list[int], count: int):
    """Return what these layers leave of a setting of `count` layers; None for a setting that is not by layer."""
    if name in LAYER_COUNTS:
        return len(layers)
    if _is_layer_numbers(name, value):
        return [layers.index(layer) for layer in value if layer in layers]
    return [value[layer] for layer in layers] if _is_by_layer(name, value, count) else None


def _is_layer_numbers(name: str, value) -> bool:
    return isinstance(value, (list, tuple)) and re.fullmatch(LAYER_NUMBERS, name) is not None


def _is_by_layer(name: str, value, count: int) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == count > 0
    return is_list and not _is_layer_numbers(name, value) and "token" not in name


def _shrink_part(config, settings: dict, layers: list[int], *, window: int, keep_vocabulary: bool) -> None:
    count = count_layers(settings)
    num_heads = next((settings[name] for name in NUM_HEADS if isinstance(settings.get(name), int)), 4)
    small = {}
    for name, value in settings.items():
        of_layers = _take_layers(name, value, layers, count)
        if _is_by_layer(name, value, count):
            small[name] = [_shrink_setting(name, own, num_heads, window) for own in of_layers]
        elif of_layers is not None:
            small[name] = of_layers
        elif keep_vocabulary and (re.fullmatch(VOCABULARY_SIZES, name) or name.endswith(TOKEN_IDS)):
            small[name] = value
        elif name.endswith(TOKEN_IDS):
            small[name] = _shrink_ids(value)
        elif name == "per_layer_config":
            of_layers = {int(layer): own for layer, own in value.items() if int(layer) in layers}
            small[name] = {
                layers.index(layer): _shrink_layer(own, num_heads, window) for layer, own in of_layers.items()
            }
        elif name.startswith("rope_") and isinstance(value, dict):
            small[name] = _shrink_rope(value)
        else:
            small[name] = _shrink_setting(name, value, num_heads, window)
    _set(config, settings, small | _settings_that_follow(settings, small))


def _set(config, settings: dict, changed: dict) -> None:
    for name, value in changed.items():
        if value != settings[name]:
            try:
                setattr(config, name, value)
            except AttributeError:  # a property that follows from others
                continue


def _shrink_setting(name: str, value, num_heads: int, window: int):
    if isinstance(value, bool) or not isinstance(value, int) or not value:
        return value
    if re.fullmatch(NUM_KEY_HEADS, name):
        return max(1, 4 * value // num_heads)
    if "window" in name and not re.search("layers|pattern|keep", name):  # doge's keep_window_size is no window
        return min(value, window)
    if re.fullmatch(VOCABULARY_SIZES, name):
        return VOCABULARY
    twins = (twin for pattern, twin in SIZES.items() if re.fullmatch(pattern, name))
    size, is_largest = next(twins, (value, False))
    return min(value, size) if is_largest else size


def _shrink_layer(own: dict, num_heads: int, window: int) -> dict:
    """Return what a layer has that is not the config's."""
    num_heads = own.get("num_attention_heads", num_heads)
    small = {name: _shrink_setting(name, value, num_heads, window) for name, value in own.items()}
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    if set(parts) <= own.keys() and own.get("head_dim") == sum(own[part] for part in parts):
        small["head_dim"] = sum(small[part] for part in parts)
    return small


def _settings_that_follow(settings: dict, small: dict) -> dict:
    """Return the settings whose value follows from others."""
    found = {}
    if settings.get("qk_rope_head_dim") and settings.get("head_dim") == settings["qk_rope_head_dim"]:
        found["head_dim"] = small["qk_rope_head_dim"]
    if settings.get("per_layer_config") and "qk_rope_head_dim" in settings:  # dots3_note
        found["rope_parameters"] = _rope_of_kinds(small)
    if settings.get("attention_hidden_size"):
        found["attention_hidden_size"] = settings["attention_hidden_size"] * WIDTH // settings["hidden_size"]
    if {"expand", "state_size", "head_dim"} <= settings.keys():  # mamba2
        found["num_heads"] = settings["expand"] * WIDTH // small["head_dim"]
    if settings.get("hybrid_layer_ids"):  # zamba2
        found["hybrid_layer_ids"] = [n for n, kind in enumerate(small["layers_block_type"]) if kind == "hybrid"]
    if settings.get("num_layers_per_stack"):  # hrm_text
        found["num_layers_per_stack"] = 2
        found["num_hidden_layers"] = 2 * settings["num_hidden_layers"] // settings["num_layers_per_stack"]
    return found


def _rope_of_kinds(small: dict) -> dict:
    """Return the rotary settings by kind of layer, with the share of a head that each kind turns."""
    rope = {kind: dict(settings) for kind, settings in small["rope_parameters"].items()}
    for layer, kind in enumerate(small["layer_types"]):
        own = {**small, **small["per_layer_config"].get(layer, {})}
        rope[kind]["partial_rotary_factor"] = own["qk_rope_head_dim"] / own["head_dim"]
    return rope


def _shrink_ids(value):
    if isinstance(value, (list, tuple)):
        return [_shrink_ids(each) for each in value]
    return value % VOCABULARY if isinstance(value, int) else value


def _shrink_rope(rope: dict) -> dict:
    """Rotary sections and factors are as many as half of a head's sizes."""
    small = {name: _shrink_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if "mrope_section" in rope:
        small["mrope_section"] = [1, 1, 0]
    half = int(8 * rope.get("partial_rotary_factor", 1))
    return small | {name: small[name][:half] for name in ("long_factor", "short_factor") if name in small}


# --- proofs -------------------------------------------------------------------------------------------------------


def random_texts(model, lengths: Sequence[int], *, seed: int = 0) -> list:
    """Return texts of ordinary tokens, each (length,), on the device of the model."""
    import torch

    device = next(model.parameters()).device
    size = min(model.config.get_text_config().vocab_size, 1000)
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, size, (length,), generator=random).to(device) for length in lengths]


@contextmanager
def in_mode(model, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation, and back into its own mode at the end."""
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


def relative_distance(found, expected) -> float:
    """Return the norm of the difference of two tensors over that of the expected one, in fp32."""
    expected = expected.float()
    return ((found.float() - expected).norm() / expected.norm()).item()
