"""Python files of a user, executed as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def execute(file: Path, name: str) -> ModuleType:
    """The module of a Python file under a name, newly executed.

    It is where dataclasses, Flax and the workers of a pool look for it. Raises what the file raises.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    before, module = sys.modules.get(name), importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module
