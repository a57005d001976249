"""For every lane: a skipped test is said aloud with its reason, and in CI it is a failure.

Excepted are tests that no set-up could make run: marked hardware. Nor is it a failure when an example of a property
takes long.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import pytest
from hypothesis import settings

settings.register_profile("ours", deadline=None)  # a loaded machine is no fault
settings.load_profile("ours")


def pytest_configure() -> None:
    """Programs that tests start inherit what is ignored here, and a shell ignores these for what it runs in the
    background or under nohup; but tests send them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _skipped(config: pytest.Config) -> list[pytest.TestReport]:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    reports = terminal.stats.get("skipped", []) if terminal else []
    return [report for report in reports if "hardware" not in report.keywords]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    place = report.longrepr
    return str(place[2] if isinstance(place, tuple) else place).removeprefix("Skipped: ")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A lane that could not run must not look like one that passed."""
    if _in_ci() and exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what was skipped by reason, the largest group first."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if not reasons:
        return
    terminalreporter.section("SKIPPED", sep="!", yellow=True, bold=True)
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} skipped: {reason}", yellow=True)
    if _in_ci() and _skipped(terminalreporter.config):
        terminalreporter.line("CI is set: what is skipped for want of set-up is a failure", red=True)
