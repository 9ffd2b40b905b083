"""Config files of a user, and those that come with tcq.

They are Python files with a function `get_config`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from tcq.config.overrides import ConfigError
from tcq.runtime import modules

_ROOT = Path(__file__).resolve().parent.parent
# Beside the package in a checkout, inside it if tcq is installed.
SHIPPED = next((p for p in (_ROOT.parent / "configs", _ROOT / "configs") if (p / "base.py").is_file()), _ROOT)


def find(name: str) -> Path:
    """Returns the config file of a path, or of a name such as "digits" or "configs/digits.py".

    Raises ConfigError if there is none.
    """
    shipped = SHIPPED / Path(name).name if str(Path(name).parent) in (".", "configs") else Path(name)
    for candidate in (Path(name), shipped, shipped.with_name(f"{shipped.name}.py")):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate
    known = ", ".join(sorted(p.name for p in SHIPPED.glob("*.py") if p.name != "__init__.py"))
    raise ConfigError(f"config file {name!r} not found; tcq comes with {known}")


def read(path: str) -> ConfigDict:
    """The config of "path.py" or "path.py:argument".

    Raises ConfigError, whatever the file raises.
    """
    name, colon, argument = path.partition(":")
    file = find(name)
    try:
        get_config = modules.execute(file, f"tcq_config_{file.stem}").get_config
        config = get_config(argument) if colon else get_config()
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config returned {type(config).__name__}, must be an ml_collections.ConfigDict")
    return config
