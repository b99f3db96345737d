"""Modules that have moved: their old names work for one release, with a warning.

A finder at the end of the import path, so that no file stands where nothing is.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "srpo.scoring": "srpo.vision.scoring",
    "srpo.corruption": "srpo.vision.corruption",
    "srpo.ablation": "srpo.vision.ablation",
    "srpo.pixel_layout": "srpo.vision.pixels",
    "srpo.demo_task": "srpo.demo.task",
    "srpo.integrations.settings": "srpo.settings",
}


class _Forwarder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        message = f"srpo: the module {module.__name__} is now {new}; the old name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        target = importlib.import_module(new)
        module.__dict__["__getattr__"] = lambda name: getattr(target, name)


sys.meta_path.append(_Forwarder())
