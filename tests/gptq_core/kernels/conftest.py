"""What the tests of the kernels share."""

import pytest

from gptq_core.kernels import c_loops, dispatch, processor


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of the machine, nothing built so far: before and after. The folder in which libraries will lie."""
    known = (processor._capabilities, dispatch.compiles, dispatch.compiles_products, c_loops.library)
    for each in known:
        each.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for each in known:
        each.cache_clear()
