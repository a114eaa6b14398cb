"""docs/operations/ matches the code: its tables are generated, and every error reason is explained."""

import re

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY

from avatar.errors import REASONS
from avatar.settings import Settings
from docs import tables

PAGES = {path: path.read_text(encoding="utf-8") for path in sorted(tables.OPERATIONS.glob("*.md"))}


def rows(heading: str) -> dict[str, list[list[str]]]:
    """Return the rows of the tables below a heading: the quoted parts of each other cell by those of the first."""
    (page,) = (text for text in PAGES.values() if f"\n## {heading}\n" in text)
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    quoted = [[re.findall("`([^`]+)`", cell) for cell in line] for line in lines]
    return {first[0]: rest for first, *rest in quoted}


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_tables_are_those_of_the_code(name: str) -> None:
    page = PAGES[tables.PAGES[name]]
    assert tables.with_table(name, page) == page, "generate them again: python -m docs.tables"


def test_every_field_of_a_settings_class_has_a_row() -> None:
    listed = {match[1].lower() for match in re.finditer(r"`AVATAR_(\w+)` \|", tables.settings_tables())}
    assert listed == {name for cls in tables.SERVICES.values() for name in cls.model_fields}


def test_a_wrapped_line_belongs_to_its_field() -> None:
    class Lamp(Settings):
        """A lamp.

        watts, volts: power and voltage,
            at most.
        colour: red or blue.
        """

    assert tables.explained(Lamp) == {
        "watts": "power and voltage, at most",
        "volts": "power and voltage, at most",
        "colour": "red or blue",
    }


def test_metrics_have_the_names_that_the_exporter_serves() -> None:
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    meter = provider.get_meter("test")
    for name, unit, _, exported in tables.instruments():
        if exported.endswith("_total"):
            meter.create_counter(name, unit).add(1)
        elif unit == "s":
            meter.create_histogram(name, unit).record(1)
        else:
            meter.create_up_down_counter(name, unit).add(1)
    served = {f"{each.name}{'_total' if each.type == 'counter' else ''}" for each in REGISTRY.collect()}
    assert {exported for *_, exported in tables.instruments()} <= served
    provider.shutdown()


def test_every_error_reason_is_explained() -> None:
    assert rows("Errors").keys() == REASONS.keys()


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_page_without_a_place_for_a_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no <!-- "):
        tables.with_table(name, "# Settings\n")
