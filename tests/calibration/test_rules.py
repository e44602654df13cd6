"""Where constants and rules come from."""

import re
from pathlib import Path

import estimator
from calibration.published import CONSTANTS, rows
from calibration.rules import Origin, all_rules, ranges


def test_every_constant_that_rows_set_is_listed_with_them() -> None:
    listed = {rule.agreeing for rule in all_rules() if rule.origin is Origin.ROWS}
    assert listed == {ids for constants in CONSTANTS.values() for ids in constants.values()}


def test_rows_named_by_rules_exist() -> None:
    known = {row.id for row in rows()}
    assert known.issuperset(one for rule in all_rules() for one in rule.agreeing)


def test_no_source_of_the_estimator_is_a_measured_row() -> None:
    sources = {row.source for row in rows()}
    named = re.compile("|".join(rf"{re.escape(source)}-\d{{4}}" for source in sources))
    for file in Path(estimator.__file__).parent.rglob("*.py"):
        for docstring in re.findall(r"Source:.*?(?:\n\s*\n|\"\"\")", file.read_text(encoding="utf-8"), flags=re.DOTALL):
            assert named.search(docstring) is None, file


def test_ids_in_a_row_are_a_span() -> None:
    assert ranges(["a-0003", "a-0001", "a-0002", "a-0007", "b-0001"]) == "a-0001–0003 0007, b-0001"
