"""RULES.md: every rule of the specification has its row, and the tests it names are there, like those of WIRE.md."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
# How many rules each section of the specification has.
SECTIONS = {
    1: 6, 2: 5, 3: 11, 4: 10, 5: 5, 6: 6, 7: 10, 8: 9, 9: 5, 10: 4, 11: 5, 12: 3, 13: 3, 14: 10, 15: 3, 16: 5, 17: 3,
    18: 2, 19: 1, 20: 4, 21: 6,
}  # fmt: skip
TEST = re.compile(r"^ *(?:async )?def test_(\w+)", re.MULTILINE)
TO_COME = "–"


def rows() -> dict[str, list[str]]:
    """The tests that each rule names."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "RULES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 3 and cells[0][:1].isdigit():
            assert cells[0] not in found, f"{cells[0]} has two rows"
            found[cells[0]] = [] if cells[2] == TO_COME else cells[2].split(", ")
    return found


def names_of_tests() -> set[str]:
    return {name for path in HERE.rglob("test_*.py") for name in TEST.findall(path.read_text())}


def test_every_rule_has_its_row_in_order():
    assert list(rows()) == [f"{section}.{rule}" for section, count in SECTIONS.items() for rule in range(1, count + 1)]


def test_every_test_that_a_rule_names_is_there():
    known = names_of_tests()

    assert {rule: missing for rule, named in rows().items() if (missing := [n for n in named if n not in known])} == {}


def test_every_test_that_the_table_of_inputs_names_is_there():
    lines = (HERE.parent / "docs/WIRE.md").read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| Kind")]
    named = {name.strip() for row in rows for name in row[-1].split(",")}

    assert rows
    assert named - names_of_tests() == set()
