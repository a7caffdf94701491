"""Re-exports of a folder's public names that import a module only when one of its names is used."""

from collections.abc import Callable
from importlib import import_module


def load_on_use(package: str, names_of: dict[str, tuple[str, ...]]) -> Callable[[str], object]:
    """Return a package's `__getattr__` (PEP 562); `names_of` lists the public names of each of its modules."""
    home_of = {name: module for module, names in names_of.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return __getattr__
