from collections.abc import Iterator

import pytest

from estimator.sources.process import Inspector


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    """One inspecting process for the whole run: starting it takes seconds."""
    inspector = Inspector(keep_spare=False)
    yield inspector
    inspector.close()
