"""Shared test set-up. The environment is set before anything imports a kernel: triton reads it when it decorates."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import time
import types
import warnings

import hypothesis
import poison
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

if INTERPRETED:
    import interpreter_guard

    interpreter_guard.install()

poison.install()
torch.set_num_threads(1)  # tensors here are tiny: waking a second thread costs more than it saves

_common = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("dev", max_examples=12, **_common)
hypothesis.settings.register_profile("ci", max_examples=12, derandomize=True, **_common)
hypothesis.settings.register_profile("thorough", max_examples=300, **_common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

_BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "skip, and say so, tests that have not begun this many minutes from now"
    parser.addoption("--minutes", type=float, metavar="N", help=what)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - _BEGUN > 60 * minutes:
        pytest.skip(f"not begun within the {minutes:g} minutes that the run was given")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests put their tensors: a GPU when there is one, else the CPU."""
    return DEVICE


@pytest.fixture(scope="session", params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it runs on both backends; on a CPU the kernels run in the guarded interpreter."""
    return request.param


@pytest.fixture(scope="session")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        from trl import GRPOTrainer
        from trl.trainer import utils
    return types.SimpleNamespace(trainer=GRPOTrainer, utils=utils)
