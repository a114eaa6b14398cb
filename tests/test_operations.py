"""docs/operations.md says what is so: its tables are those of the code, and no refusal and no alert is left out."""

import re

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY

from avatar.errors import REASONS
from avatar.settings import Settings
from docs import tables

DOCUMENT = tables.OPERATIONS.read_text(encoding="utf-8")


def rows(heading: str) -> dict[str, list[list[str]]]:
    """The tables below a heading: what the first cell of a row has in backquotes, and what each of the others has."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    quoted = [[re.findall("`([^`]+)`", cell) for cell in line] for line in lines]
    return {first[0]: rest for first, *rest in quoted}


def test_the_tables_are_those_of_the_code() -> None:
    assert tables.with_tables(DOCUMENT) == DOCUMENT, "write them again: python -m docs.tables"


def test_every_field_of_a_settings_class_has_a_row() -> None:
    listed = {match[1].lower() for match in re.finditer(r"`AVATAR_(\w+)` \|", tables.settings_table())}
    assert listed == {name for cls in tables.SERVICES.values() for name in cls.__dataclass_fields__}


def test_a_wrapped_line_belongs_to_its_field() -> None:
    class Lamp(Settings):
        """A lamp.

        watts, volts: what it takes,
            at most.
        colour: red or blue.
        """

    assert tables.explained(Lamp) == {
        "watts": "what it takes, at most",
        "volts": "what it takes, at most",
        "colour": "red or blue",
    }


def test_metrics_are_called_as_the_exporter_calls_them() -> None:
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    meter = provider.get_meter("test")
    for name, unit, _, shown in tables.instruments():
        if shown.endswith("_total"):
            meter.create_counter(name, unit).add(1)
        elif unit == "s":
            meter.create_histogram(name, unit).record(1)
        else:
            meter.create_up_down_counter(name, unit).add(1)
    served = {f"{each.name}{'_total' if each.type == 'counter' else ''}" for each in REGISTRY.collect()}
    assert {shown for *_, shown in tables.instruments()} <= served
    provider.shutdown()


def test_every_reason_of_a_refusal_is_explained() -> None:
    assert rows("What a refusal means").keys() == REASONS.keys()


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_document_without_a_place_for_a_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no <!-- "):
        tables.with_tables(DOCUMENT.replace(f"<!-- {name}:", "<!-- "))
