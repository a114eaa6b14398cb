"""The fields of a checkpoint's config.json: which are known, their types and their ranges."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
# The least and the greatest value of a number, or of each number of a list; whole numbers have whole limits.
Range = tuple[float, float]

# Layers of a network, and any other count of its parts: more would take all memory before weights are compared.
MAX_LAYERS, MAX_SIZE = 1 << 10, 1 << 20
# Constants that keep a division from zero.
EPSILON: Range = (1e-12, 1.0)

# Types of fields: their name in JSON, and the classes of their values.
JSON_TYPES: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a finite number", (int, float)),
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    dict: ("an object", (Mapping,)),
    Mapping: ("an object", (Mapping,)),
    NoneType: ("null", (NoneType,)),
}


def parse_fields(config: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Return the values as this dataclass. ValueError names fields that are missing or of another type.

    Unknown fields are left out, and named in the log: files of other tools have some, and a part's shapes are compared
    with its weights anyway. prefix: of the fields' names in messages, such as `picture.`.
    """
    check_object(values, prefix)
    known = {each.name: each for each in fields(config)}  # type: ignore[arg-type]
    values = known_fields(values, known, prefix)
    required = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"missing field {', '.join(prefix + name for name in missing)}")
    hints = get_type_hints(config)
    for name, value in values.items():
        if expected := other_types(value, hints[name]):
            raise ValueError(f"{prefix}{name} must be {expected}, got {value!r}")
    return config(**values)


def other_types(value: object, hint: Any) -> str:
    """Return the JSON types that a field has by its type hint, in words, if the value is of none; else an empty string.

    Hints of other types than numbers, texts, switches, objects, null and lists of these are not checked.
    """
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    expected = [_other_type(value, choice) for choice in choices]
    return "" if "" in expected else " or ".join(expected)


def _other_type(value: object, hint: Any) -> str:
    """Return the type of a hint that is no union, in words, if the value has another one."""
    if get_origin(hint) is tuple:
        items = get_args(hint)
        length = None if items[-1] is ... else len(items)
        is_list = isinstance(value, list | tuple) and length in (None, len(value))
        wrong = [other_types(each, items[0]) for each in value] if is_list else [""]  # type: ignore[attr-defined]
        if is_list and not any(wrong):
            return ""
        item = JSON_TYPES.get(items[0], ("a list",))[0]
        return f"a list of {f'{length} ' if length else ''}values, each {item}"
    words, types = JSON_TYPES.get(get_origin(hint) or hint, ("", ()))
    return "" if not words or is_of(value, types) else words


def is_of(value: object, types: tuple[type, ...]) -> bool:
    """Return True if a value of JSON has one of these types; a switch is no number, and numbers are finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Raise ValueError unless every number lies in its range, or every number of a list.

    values: a configuration's fields; those that are missing or null are not checked. prefix: of names in messages.
    """
    check_object(values, prefix)
    for name, (least, most) in ranges.items():
        value = values.get(name)
        for each in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            expected = other_types(each, int if isinstance(most, int) else float)
            if expected or not least <= each <= most:
                raise ValueError(f"{prefix}{name} must be {expected or f'{least} to {most}'}, got {value!r}")


def check_object(values: object, prefix: str) -> None:
    """Raise ValueError unless the values are an object of a config.json. prefix: its name and a dot."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.removesuffix('.')} must be an object with fields, got {values!r}")


def transformers_config(kind: Any, sizes: Mapping[str, Any], ranges: Mapping[str, Range]) -> Any:
    """Return a configuration of transformers. ValueError names the field that is invalid, or outside its range.

    kind: the configuration's class. sizes: the fields of `network` in config.json.
    """
    # Slow to import, and only needed where a model of transformers runs.
    from huggingface_hub.errors import StrictDataclassError
    from transformers.activations import ACT2FN

    check_ranges(sizes, ranges, "network.")
    try:
        config = kind(**sizes)
    except StrictDataclassError as error:
        raise ValueError(f"network: {' '.join(str(error).split())}") from error
    for name in ("hidden_act", "feat_extract_activation", "activation_function", "dense_act_fn"):
        if (value := getattr(config, name, None)) is not None and value not in ACT2FN:
            raise ValueError(f"network.{name} must be an activation function that transformers has, got {value!r}")
    return config


def known_fields(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Return the known fields of an object in a config.json, and name the others in the log. prefix: of their names."""
    expected = [*known]
    if unknown := sorted(set(values) - set(expected)):
        names = ", ".join(prefix + name for name in unknown)
        logger.warning("ignored unknown fields of a checkpoint: %s; known are %s", names, ", ".join(expected))
    return {name: value for name, value in values.items() if name in expected}
