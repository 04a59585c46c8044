import os
import signal
import subprocess
import sys
import time

PARENT = """
import os, time
from experiments.workers import worker_pool

if __name__ == "__main__":
    pool = worker_pool(2)
    print(*{future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}, flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Whoever adopted it may not have waited for it yet
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        workers = list(map(int, parent.stdout.readline().split()))
        assert workers
        assert all(map(alive, workers))
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, workers))
