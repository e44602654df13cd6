"""Which patterns are accepted."""

import pytest

from app.regex import check_pattern
from estimator.errors import RequestError


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj",
        r".*\.layers\.\d+\..*(q_proj|v_proj)$",
        "q_proj",
        r"model\.layers\.[0-9]{1,2}\.mlp\..*",
        r"(?!.*lm_head).*proj",
    ],
)
def test_usual_patterns_are_accepted(pattern: str) -> None:
    assert check_pattern("peft.target_modules", pattern) == pattern


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(.*a){20}", r".*.*.*.*x", r"(a)\1*", "(", "*x", r"((a{2,}){2,}){2,}"])
def test_patterns_that_can_run_away_or_do_not_compile_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError, match=r"peft\.target_modules"):
        check_pattern("peft.target_modules", pattern)
