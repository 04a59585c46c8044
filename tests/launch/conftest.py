"""The undisturbed run with which every disturbed one is compared."""

import pytest

from tests.chaos.harness import kill, workers
from tests.launch.tiny import launch, options


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Holds the runs, their text and their tokens."""
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="session")
def torchrun():
    """launch/torchrun.sh as `tiny.launch` starts it; what a failed test leaves running is killed in the end."""
    runs = []

    def start(out, arguments, **settings):
        runs.append(launch(out, arguments, **settings))
        return runs[-1]

    yield start
    for run in runs:
        if run.poll() is None:
            ranks = workers(run)
            run.kill()
            kill(ranks)
            run.wait()


@pytest.fixture(scope="session")
def straight(folder, torchrun):
    """The directory of a run on two ranks that nothing disturbed."""
    run = torchrun(folder / "straight.out", options(folder, "straight"), PROCESSES=2)
    assert run.wait(timeout=120) == 0, (folder / "straight.out").read_text()[-2000:]
    return folder / "straight"
