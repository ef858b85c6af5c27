"""Strict settings for every test: CPU, eight virtual devices, strict dtypes, no rank promotion."""

import gc
import os

import pytest
from _xla import COMPILE_QUICKLY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        COMPILE_QUICKLY,
    )
).strip()
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Drops the compiled programs of a module with it.

    Each takes memory maps, of which a process has 65,530 on Linux: all tests together crash it.
    """
    yield
    import jax

    jax.clear_caches()
    gc.collect()


def pytest_collection_finish(session):
    """Collects garbage once a module (above) and else seldom: it takes a tenth of the tests' time.

    Traces make many objects, and the collector walks every module that is loaded for them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
