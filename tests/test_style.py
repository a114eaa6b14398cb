"""Tests of the code base: names, docstrings, and the length of files."""

import re
from collections import Counter

from tests.test_architecture import FOLDERS, ROOT, files, module_of

PRODUCT = ("avatar", "services", "web")
# File names that several folders may have, and a class that is one thing to workers and to product teams.
REPEATABLE = {f"{name}.py" for name in ("service", "model", "client", "codec", "config", "__main__", "__init__")}
REPEATABLE |= {"Session"}
# A docstring states what something is or does, and does not open like a question.
QUESTION = re.compile(r'^ *"""\s*(?:What|How|Whether|Where|Whom|Who|Which|Have)\b.*', re.MULTILINE)
CLASS = re.compile(r"^ *class ([A-Za-z]\w*)", re.MULTILINE)
MAX_LINES, MAX_FILES = 400, 10
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}


def test_a_name_has_one_meaning() -> None:
    """In the product no two files and no two public classes share a name."""
    owners: dict[str, list[str]] = {}
    for path in files(*PRODUCT):
        module = module_of(path)
        owners.setdefault(path.name, []).append(module)
        for name in CLASS.findall(path.read_text(encoding="utf-8")):
            owners.setdefault(name, []).append(module)
    shared = {name: modules for name, modules in owners.items() if len(modules) > 1}
    assert shared.keys() - REPEATABLE == set(), shared


def test_no_docstring_opens_with_a_question_word() -> None:
    found = {path: QUESTION.findall(path.read_text(encoding="utf-8")) for path in files(*FOLDERS, "examples", "tests")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines} == {}


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(*FOLDERS, "tests")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_folder_of_the_product_has_too_many_files() -> None:
    counts: Counter[str] = Counter()
    for path in files(*PRODUCT):
        counts[str(path.parent.relative_to(ROOT))] += path.name != "__init__.py"
    assert {name: count for name, count in counts.items() if count > MAX_FILES} == {}


def test_no_module_has_a_vague_name() -> None:
    modules = [module_of(path) for path in files(*FOLDERS, "tests")]
    assert [module for module in modules if VAGUE & set(module.split("."))] == []
