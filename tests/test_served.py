"""The check of memory in load and fuzz runs, which are too long to be broken on purpose each time."""

from typing import Any

from estimator.units import KIB, MIB
from tests.served import Watch, growth


class Growing:
    """A process that takes some memory for good at every request after so many."""

    def __init__(self, leak_bytes: int, warm_after: int) -> None:
        self._leak_bytes, self._warm_after, self._asked = leak_bytes, warm_after, 0

    @property
    def resident_bytes(self) -> int:
        self._asked += 1
        return 100 * MIB + 4 * KIB * min(self._asked, self._warm_after) + self._leak_bytes * self._asked


def told(process: Any, requests: int) -> str | None:
    watch = Watch(process, MIB)
    for _ in range(requests):
        watch.note()
    return watch.complaint


def test_a_process_that_only_warms_up_is_not_complained_of() -> None:
    assert told(Growing(0, warm_after=2000), 4000) is None


def test_a_leak_of_every_request_is_told_with_its_size() -> None:
    complaint = told(Growing(2000, warm_after=500), 4000)
    assert complaint is not None
    assert "1,999 requests: 2,000 bytes for each; accepted: 1.0 MiB in all" in complaint


def test_too_few_requests_are_not_judged() -> None:
    assert told(Growing(MIB, warm_after=0), 900) is None


def test_growth_within_the_limit_is_accepted() -> None:
    assert growth(MIB, 2 * MIB, 10, MIB) is None
    assert growth(MIB, 2 * MIB + 1, 10, MIB) is not None
