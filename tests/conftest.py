"""Lets `pytest` find the scripts, however it is called, and lets two processes share a whole run.

Every script brings some eighty tests that need one thread. A run of everything on two cores or more
is therefore split in two: the tests of some scripts, and those of the others, which take as long.
Both print, and the run fails if one of them does.
"""

import functools
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# One thread each: a thread that waits for one without a core spins, and two halves take five times
# as long. Read when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.same_name import SCRIPTS  # noqa: E402

READ = functools.cache(inspect.getsource)


def source_of(thing):
    """inspect.getsource, which takes longer than the rest of parse_args, once for every class."""
    return READ(thing) if inspect.isclass(thing) else READ.__wrapped__(thing)


inspect.getsource = source_of

HALF = "TEST_HALF"      # 0: the process that was started, 1: its helper
HELPED = "mod mor tah adainfer looped softmask".split()     # about half of all the seconds


def belongs_to(item):
    """Which half runs a test: that of its script, which its name or its file mentions, or 0."""
    words = item.nodeid.replace(".py", "").replace("[", "-").replace("]", "-")
    parts = [part for word in words.split("/") for part in word.split("-")]
    names = [part.split("::")[0].removeprefix("test_") for part in parts]
    return next((int(name in HELPED) for name in names if name in SCRIPTS), 0)


def pytest_configure(config):
    alone = config.invocation_params.args or (os.cpu_count() or 1) < 2 or HALF in os.environ
    config.helper = None
    if not alone:
        config.helper_output = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        config.helper = subprocess.Popen(command, cwd=ROOT, env={**os.environ, HALF: "1"},
                                         stdout=config.helper_output, stderr=subprocess.STDOUT)


def pytest_collection_modifyitems(config, items):
    if logging := config.pluginmanager.get_plugin("logging-plugin"):
        config.pluginmanager.unregister(logging)    # it makes torch describe all that it compiles
    if config.helper or HALF in os.environ:
        half = int(os.environ.get(HALF, 0))
        items[:] = [item for item in items if belongs_to(item) == half]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    helper = session.config.helper
    if helper and helper.wait() not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.helper:
        config.helper_output.seek(0)
        terminalreporter.section("the other half")
        terminalreporter.write(config.helper_output.read())


def pytest_unconfigure(config):
    if config.helper:
        config.helper.kill()
