"""Overrides such as "--config.loss.clip=64": the only parser of them."""

import ast
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

COUNT_OR_SHARE = ("loss.clip", "optim.warmup_steps")  # an int is a count, a float a share


class ConfigError(ValueError):
    """The config cannot work.

    The message has the key, the value, what is allowed, and what to do.
    """


def parse(overrides: Iterable[str], base: ConfigDict) -> dict[str, Any]:
    """The values of overrides by their keys, with the types of the keys in `base`.

    An override is "key=value", "--config.key=value", or for a bool also "--config.key" and "--noconfig.key".
    Raises ConfigError for an unknown key, a missing value or a value of another type.
    """
    known = flatten(base)
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        negated = key.startswith("--noconfig.")
        key = key.removeprefix("--noconfig.").removeprefix("--").removeprefix("config.")
        if key not in known:
            raise ConfigError(f"--config.{key} is unknown{suggestion(key, known)}")
        if not equals and not isinstance(known[key], bool):
            raise ConfigError(f"--config.{key} has no value: write --config.{key}=...")
        if negated and (equals or not isinstance(known[key], bool)):
            raise ConfigError(f"{override}: --noconfig is for switches, without a value: write --config.{key}=...")
        values[key] = _value(key, text, known[key]) if equals else not negated
    return values


def _value(key: str, text: str, example: Any) -> Any:
    """The value of a text, of the type of an example."""
    expected = type(example).__name__
    try:
        if key in COUNT_OR_SHARE:
            expected = "a count such as 64 or a share such as 0.1"
            if key == "loss.clip" and text.startswith("kinds="):
                return text
            return float(text) if _is_float(text) else int(text)
        if isinstance(example, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(example, tuple):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        return type(example)(text)
    except (ValueError, KeyError, SyntaxError):
        raise ConfigError(f"--config.{key}={text}: must be {expected}") from None


def _is_float(text: str) -> bool:
    return not text.lstrip("+-").isdecimal()


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a config by keys such as "loss.clip"."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def suggestion(key: str, known: Mapping[str, Any]) -> str:
    """The end of a message about an unknown key.

    It names the known keys of the same last name, or the most similar key.
    """
    name, by_name = key.split(".")[-1], {k.split(".")[-1]: k for k in known}
    near = (
        [k for k in known if k.split(".")[-1] == name]
        or difflib.get_close_matches(key, list(known), 1, 0.6)
        or [by_name[n] for n in difflib.get_close_matches(name, list(by_name), 1, 0.6)]
    )
    return f": did you mean {' or '.join(near)}?" if near else "; configs/base.py lists all keys"
