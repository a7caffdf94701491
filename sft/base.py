"""Which base a model was trained from: the sha256 of its config and weights, stored with each run and adapter.

    {"model": "/models/qwen", "revision": null, "config": "<sha256>", "weights": {"model.safetensors": "<sha256>"}}

run.json holds it under "base", an adapter's folder in base.json. The files' bytes count: a moved folder is the same
base; a copy in another precision, quantised or in other shards is another one.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from sft.files import CACHE_DIR, hash_file, write_json

BASE_RECORD = "base.json"
RUN_RECORD = "run.json"
ADAPTER = "adapter_config.json"
CONFIG = "config.json"
# As transformers chooses: one file, else the shards that an index lists.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Settings that say who saved a config and how it is loaded, not which model it is.
UNRELATED_SETTINGS = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache")
MAX_HASH_THREADS = 16
MIN_CACHED_BYTES = 1 << 24  # smaller files are hashed again
SETTLED_NS = 2 * 10**9  # age of a file from which a later change shows in its times


# --- the files of a base ------------------------------------------------------------------------------------------


def find_folder(model: str) -> Path | None:
    """Return the local folder of a base: itself, or the snapshot of a hub model in the hub's cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        found = try_to_load_from_cache(model, CONFIG)
        return Path(found).parent if isinstance(found, str) else None
    return None


def find_weights(folder: Path) -> list[Path]:
    """Return the files of weights that transformers reads from a folder; all of them where their names are others."""
    for name in WEIGHTS:
        file = folder / name
        if file.is_file() and name.endswith(".index.json"):
            with suppress(ValueError, KeyError, AttributeError, TypeError):
                shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
        elif file.is_file():
            return [file]
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")])


def identify_base(model: str, *, cache_dir: str = CACHE_DIR) -> dict | None:
    """Return the identity of a base, or None where its files are not all on this machine; reads every byte once."""
    folder = find_folder(model)
    files = find_weights(folder) if folder else []
    if not files or not all(file.is_file() for file in [*files, folder / CONFIG]):
        return None
    digests = hash_in_threads(files, Path(cache_dir).expanduser() / "hashes")
    return {
        "model": model,
        "revision": None if Path(model).expanduser().is_dir() else folder.name,
        "config": hash_config(folder / CONFIG),
        "weights": {file.name: digest for file, digest in zip(files, digests, strict=True)},
    }


def hash_model(path: str, *, cache_dir: str = CACHE_DIR) -> str | None:
    """Return one sha256 of a local model's or adapter's config and weights; None for a hub model."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    files = [*find_weights(folder), *(folder / name for name in (CONFIG, ADAPTER) if (folder / name).is_file())]
    digests = hash_in_threads(files, Path(cache_dir).expanduser() / "hashes")
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def hash_config(path: Path) -> str:
    """Return the sha256 of a config's settings, in any order and without those that don't change the model."""
    text = path.read_bytes()
    with suppress(ValueError, AttributeError):
        settings = json.loads(text)
        kept = {name: value for name, value in settings.items() if name not in UNRELATED_SETTINGS}
        text = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()


def hash_in_threads(files: Sequence[Path], cache: Path) -> list[str]:
    """Return the sha256 of each file, several at a time."""
    free_threads = threading.Semaphore(min(MAX_HASH_THREADS, max(2, os.cpu_count() or 2)))

    def hash_in_turn(file: Path) -> str:
        with free_threads:
            return hash_once(file, cache)

    return [future.result() for future in [start_thread(hash_in_turn, file) for file in files]]


def start_thread(function: Callable, *arguments, **options) -> Future:
    """Call a function in a thread that an exit doesn't wait for; return the future of its result."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=function.__name__, daemon=True).start()
    return future


def hash_once(file: Path, cache: Path) -> str:
    """Return the sha256 of a file: of the hub's blob by its name, of a file that didn't change from the cache."""
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    entry = cache / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state_of(real):
            return known["sha256"]
    state = state_of(real)
    digest = hash_file(real)
    is_settled = time.time_ns() - max(state[2:4]) > SETTLED_NS
    if state[0] >= MIN_CACHED_BYTES and is_settled and state == state_of(real):
        with suppress(OSError):  # a cache that can't be written only costs time
            cache.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"file": str(real), "state": state, "sha256": digest})
    return digest


def state_of(file: Path) -> list[int]:
    """Return size, inode and times of a file; ctime changes with every write and can't be set back."""
    status = file.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


# --- stored with a run --------------------------------------------------------------------------------------------


class BaseIdentity:
    """The identity of a run's base, hashed in the background from the files that the model was loaded from."""

    def __init__(self, model: str, *, cache_dir: str, say: Callable[[str], None]):
        self._model = model
        self._cache_dir = cache_dir
        self._say = say
        self._future: Future | None = None
        self._has_said_missing = False

    def start(self) -> None:
        """Hash in the background, on the one rank that saves."""
        self._future = start_thread(identify_base, self._model, cache_dir=self._cache_dir)

    def wait(self) -> dict | None:
        """Return the identity; None, after a line that says so, where it can't be found."""
        if self._future is None:
            self.start()
        with suppress(OSError):
            if found := self._future.result():
                return found
        if not self._has_said_missing:
            self._has_said_missing = True
            self._say(f"{self._model}: its files were not all found, so the run doesn't store which base it has")
        return None

    def store_with_adapters(self, model) -> None:
        """Let `model.save_pretrained` write base.json beside each adapter."""
        save = model.save_pretrained

        def save_with_base(folder, *arguments, **options):
            save(folder, *arguments, **options)
            if identity := self.wait():
                write_json(Path(folder) / BASE_RECORD, identity)

        model.save_pretrained = save_with_base


# --- compared -----------------------------------------------------------------------------------------------------


def read_identity(folder: str | Path) -> dict | None:
    """Return the identity that an adapter's or a run's folder holds of its base, or None."""
    for name in (BASE_RECORD, RUN_RECORD):
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            found = found if name == BASE_RECORD else found.get("base")
            if isinstance(found, dict) and {"model", "config", "weights"} <= found.keys():
                return found
    return None


def base_of_adapter(folder: str | Path) -> str | None:
    """Return the base that an adapter's config names; None where the folder holds no adapter."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((Path(folder) / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return None


def check_base(folder: str | Path, base: str, *, remedy: str = "", cache_dir: str = CACHE_DIR, say=None) -> None:
    """Raise ValueError when `base` is another one than the adapter or run in `folder` was trained from.

    `say` gets a line where that can't be compared; `remedy`: where to write the path of the right base.
    """
    say = say or _say_on_error_stream
    trained = read_identity(folder)
    if trained is None:
        say(f"note: {folder} holds no hash of its base, so {base} is not compared with the one it was trained from")
        return
    given = identify_base(base, cache_dir=cache_dir)
    if given is None:
        say(f"note: {base}: its files are not all on this machine, so it is not compared with the base of {folder}")
        return
    if difference := find_difference(trained, given):
        raise ValueError(
            f"{folder}: was trained from {_name_base(trained)}, and {_name_base(given)} is another base: {difference}; "
            f"put that base back, or {remedy or f'write its path into {Path(folder) / ADAPTER}'}"
        )


def find_difference(trained: Mapping, given: Mapping) -> str | None:
    """Return how two bases differ, or None; names and places of their files don't count."""
    if trained["config"] != given["config"]:
        return f"its {CONFIG} differs"
    known = set(trained["weights"].values())
    if known == set(given["weights"].values()):
        return None
    changed = [name for name, digest in given["weights"].items() if digest not in known]
    if not changed:
        return f"it has {len(given['weights'])} files of weights instead of {len(trained['weights'])}"
    if len(changed) == 1:
        return f"the weights in {changed[0]} differ"
    return f"the weights in {changed[0]} and {len(changed) - 1} more differ"


def _name_base(identity: Mapping) -> str:
    """Return a base's name with the first digits of the hash of its weights, which tell two of one path apart."""
    digest = hashlib.sha256("".join(sorted(identity["weights"].values())).encode()).hexdigest()[:8]
    return f"{identity['model']} (weights {digest})"


def _say_on_error_stream(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
