"""Run a function once transformers has been imported, without importing it."""

import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, function: Callable[[], None], dependents: Collection[str] = ()) -> None:
    """Call a function once, as soon as a module has been imported, or at once if it is imported already.

    Args:
        name: Module to wait for, such as "transformers".
        function: Function without arguments. It is called in the thread that imports the module.
        dependents: Modules that import `name` and that `function` imports. The call waits until they are complete,
            since `function` must not use a partially imported module.
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function, dependents))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, function: Callable[[], None], dependents: Collection[str]):
        self.name, self.function, self.watched = name, function, {name, *dependents}
        self.depth = 0  # number of watched modules that are being imported, nested in each other

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def finish(self) -> None:
        if self in sys.meta_path and self.name in sys.modules:
            sys.meta_path.remove(self)
            self.function()


class _Loader(Loader):
    """Loader of a watched module. It notifies the finder when the module is complete."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_code, is_package and others, for tools that only look the module up

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader  # tools read source and data of a module through its loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.depth -= 1
        if self.finder.depth == 0:
            self.finder.finish()
