import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_to_stay_is_not_searched() -> None:
    """Takes the modules of torch and transformers out of garbage collections, which tests ask for often and would each take 0.3 s."""
    gc.collect()
    gc.freeze()
