"""Where constants and rules come from."""

import re
import statistics
from pathlib import Path

import pytest

import estimator
from calibration.published import CONSTANTS, rows
from calibration.rules import Origin, all_rules, ranges
from estimator.allocator import IDLE_SHARE, Head
from estimator.device import context_bytes, library_bytes
from estimator.gpus import find_gpu


def test_every_constant_that_rows_set_is_listed_with_them() -> None:
    listed = {rule.agreeing for rule in all_rules() if rule.origin is Origin.ROWS}
    assert listed.issuperset(ids for constants in CONSTANTS.values() for ids in constants.values())


@pytest.mark.parametrize(("head", "named"), [(Head.FULL_LOGITS, "full logits"), (Head.FUSED, "fused loss")])
def test_the_idle_share_is_the_median_of_the_rows_it_names(head: Head, named: str) -> None:
    (rule,) = (rule for rule in all_rules() if rule.origin is Origin.ROWS and named in rule.name)
    outside = context_bytes(find_gpu("a100-80").num_sms) + library_bytes()
    of = {row.id: row for row in rows()}
    shares = []
    for one in rule.agreeing:
        device, peak, resting = of[one].device_bytes, of[one].allocated_bytes, of[one].resting_bytes
        assert device is not None
        assert peak is not None
        assert resting is not None
        shares.append((device - outside - peak) / (peak - resting))
    assert round(statistics.median(shares), 2) == IDLE_SHARE[head]


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
