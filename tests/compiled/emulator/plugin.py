"""Run the project's own tests on emulated machine code.

    PYTHONPATH=tests python -m pytest -p compiled.emulator.plugin tests/kernels tests/api -k triton

EMULATED_TARGET chooses the GPU (sm_90). A race in any launch fails the test that launched it.
"""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # before the conftest decides


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Emulate every launch of a test."""
    from compiled.emulator.launcher import emulated  # after the conftest: this imports Triton

    with emulated(os.environ.get("EMULATED_TARGET", "sm_90")) as session:
        result = yield
    item.user_properties.append(("launches", len(session.runs)))
    assert not session.races, "\n".join(session.races)
    return result


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many launches were emulated."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key) if r.when == "call"]
    launches = [dict(r.user_properties).get("launches", 0) for r in reports]
    terminalreporter.write_line(f"emulated {sum(launches)} launches in {sum(n > 0 for n in launches)} tests")
