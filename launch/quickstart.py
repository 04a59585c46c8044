"""`make train`: pre-trains the quick-start model with one process per GPU, or two without GPUs, and prints the results.

Of 3, 5, 6 or 7 GPUs it takes as many as divide the batch.

Training goes through torchrun and train.py like any other run; this script adds the comparison at the end. Arguments are
passed on to train.py.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from polargrad_dist.words import counted

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Options of train.py that train nothing
ONLY_SHOW = (
    "--dry_run",
    "--dry_run_full",
    "--print_config",
    "--help",
    "-h",
)


def main() -> int:
    import torch

    processes = ranks(torch.cuda.device_count() or 2)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    train = ["train.py", "--config", CONFIG, *sys.argv[1:]]
    if any(word.split("=")[0] in ONLY_SHOW for word in sys.argv[1:]):
        return subprocess.run([sys.executable, *train], cwd=ROOT, check=False).returncode
    command = [*torchrun, *train]
    threads = str(max(1, (os.cpu_count() or 2) // processes))
    print("$", shlex.join(["torchrun", *command[3:]]), flush=True)
    print("importing torch: up to a minute without output on busy cores", flush=True)
    code, stopped = ended(command, {"OMP_NUM_THREADS": threads} | os.environ)
    if code:
        why = (
            f"stopped by {stopped.name}; the traceback above is torchrun's. The same command resumes from what was saved"
            if stopped
            else f"training ended with exit code {code}; what was saved is in the run directory"
        )
        print(why, file=sys.stderr)
        return code
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    return summary(processes)


def ranks(most: int) -> int:
    """The largest number of processes that share the batch of the configuration equally."""
    import yaml

    batch = yaml.safe_load((ROOT / CONFIG).read_bytes())["trainer"]["global_batch"]
    return max(count for count in range(1, most + 1) if batch % count == 0)


def ended(command: list[str], environment: dict[str, str]) -> tuple[int, signal.Signals | None]:
    """The exit code of a command, and the last signal that was passed on to it. It is a session of its own, so that a
    signal reaches it once, from here, and however it was sent: this waits until the ranks have saved and gone."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    passed: list[signal.Signals] = []

    def forward(number: int, _: object) -> None:
        passed.append(signal.Signals(number))
        process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    code = process.wait()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    return code if code >= 0 else 128 - code, passed[-1] if passed else None


def summary(processes: int) -> int:
    """Prints validation bits per byte beside those of a bigram model, a sample, the report, and what to do next."""
    from polargrad_dist.trainer.metrics import record_in
    from tools.bigram import measure
    from tools.report import write_report
    from tools.runs import load_run
    from train import parse_run

    config, _, _ = parse_run(["--config", CONFIG, *sys.argv[1:]])
    run = load_run(config.trainer.run_dir)
    records = map(record_in, (run.folder / "metrics.jsonl").read_bytes().splitlines())
    reached = [record for record in records if record and "bits_per_byte" in record]
    steps = config.trainer.steps
    # Each line is printed as soon as it is known: on busy cores the bigram model and the sample take minutes.
    if not reached:
        print("\nvalidation: not configured", flush=True)
    else:
        print(
            f"\nvalidation: {reached[-1]['bits_per_byte']:.3f} bits per byte after {counted(reached[-1]['step'], 'step')}",
            flush=True,
        )
        print(
            "bigram model of the same tokens (interpolated Kneser-Ney): "
            f"{measure(run.folder, run.data)['bits_per_byte']:.3f} bits per byte",
            flush=True,
        )
    print("\nsample:", flush=True)
    print(f"{run.sample('def ', 120)}\n", flush=True)
    print(f"report: {write_report([run.folder], run.folder / 'report.html')}")
    print(f"run directory: {run.folder}")
    again = ["torchrun", "--standalone", f"--nproc_per_node={processes}", "train.py", "--config", CONFIG]
    print(f"resume or lengthen: {shlex.join([*again, *sys.argv[1:], '--trainer.steps', str(2 * steps)])}")
    print(
        f"more text: {shlex.join(['python', '-m', 'tools.generate', str(run.folder), '--prompt', 'class '])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
