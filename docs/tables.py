"""The tables of docs/operations.md that are made from code: `python -m docs.tables` writes them again.

A table stands between `<!-- NAME: made by docs/tables.py -->` and `<!-- end -->`.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from opentelemetry import metrics

from avatar import settings, telemetry
from avatar.settings import PREFIX, Settings

OPERATIONS = Path(__file__).with_name("operations.md")
SERVICES = {
    "all": settings.Settings,
    "workers": settings.WorkerSettings,
    "audio": settings.AudioSettings,
    "denoiser": settings.DenoiserSettings,
    "vae": settings.VaeSettings,
    "text": settings.TextSettings,
    "gateway": settings.GatewaySettings,
}


def settings_table() -> str:
    """Every variable that a service reads, with its default and what its class's docstring says of it."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {service} | {_default(cls, name)} | {meaning} |"
        for service, cls in SERVICES.items()
        for name, meaning in explained(cls).items()
    ]
    return "\n".join(["| variable | service | default | meaning |", "| --- | --- | --- | --- |", *rows])


def explained(cls: type[Settings]) -> dict[str, str]:
    """What a class's docstring says of each of its own fields: `name, name: text`, wrapped lines indented."""
    found: dict[str, str] = {}
    for line in re.sub(r"\n {4,}", " ", inspect.cleandoc(cls.__doc__ or "")).splitlines():
        if match := re.fullmatch(r"(\w+(?:, \w+)*): (.+)", line):
            found.update(dict.fromkeys(match[1].split(", "), match[2].rstrip(".")))
    return found


def _default(cls: type[Settings], name: str) -> str:
    (given,) = (each.default for each in fields(cls) if each.name == name)
    if given is not MISSING:
        return _shown(given)
    own = {service: getattr(each, name, None) for service, each in SERVICES.items()}
    return ", ".join(f"{service} {_shown(value)}" for service, value in own.items() if value)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"`{value}`" if value not in ("", None) else "none"


def instruments() -> Iterator[tuple[str, str, str, str]]:
    """Of every metric: its name, unit, description, and its name at `/metrics`."""
    for each in vars(telemetry).values():
        if isinstance(each, metrics.Instrument):
            made: Any = each  # what the API gives before there is a provider keeps these to itself
            name, unit, description = made._name, made._unit, made._description
            shown = name.replace(".", "_") + ("_seconds" if unit == "s" else "")
            yield name, unit, description, shown + ("_total" if isinstance(each, metrics.Counter) else "")


def metrics_table() -> str:
    """Every metric."""
    rows = [f"| `{name}` | `{shown}` | {unit} | {text} |" for name, unit, text, shown in sorted(instruments())]
    return "\n".join(["| metric | at `/metrics` | unit | what |", "| --- | --- | --- | --- |", *rows])


TABLES = {"settings": settings_table, "metrics": metrics_table}


def with_tables(document: str) -> str:
    """The document, each of its tables made anew. ValueError if one is not there."""
    for name, table in TABLES.items():
        mark = f"<!-- {name}: made by docs/tables.py -->"
        if mark not in document:
            raise ValueError(f"the document has no {mark}")
        head, _, rest = document.partition(mark)
        document = f"{head}{mark}\n{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return document


if __name__ == "__main__":
    OPERATIONS.write_text(with_tables(OPERATIONS.read_text(encoding="utf-8")), encoding="utf-8")
