"""How long a command takes to answer, against Python itself: python -m tests.benchmarks.startup

Each round runs all of them in turn; the ratio of a command is the median over the rounds of its time over that of
`python -c pass` in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = ("--help", "run --help", "--version", "eval --help", "report --help")


def seconds(*arguments: str) -> float:
    """Wall-clock time of Python with these arguments."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Command -> median seconds, and median ratio to Python's own start."""
    times: dict[str, list[float]] = {command: [] for command in ("python", *COMMANDS)}
    for _ in range(rounds):
        times["python"].append(seconds("-c", "pass"))
        for command in COMMANDS:
            times[command].append(seconds("-m", "samtune", *command.split()))
    return {
        command: {
            "seconds": statistics.median(of_command),
            "ratio": statistics.median(t / p for t, p in zip(of_command, times["python"], strict=True)),
        }
        for command, of_command in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = measure(asked.rounds)
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for command, figures in found.items():
        name = "python -c pass" if command == "python" else f"samtune {command}"
        print(f"{name:<24} {1000 * figures['seconds']:6.0f} ms  {figures['ratio']:5.1f} times")


if __name__ == "__main__":
    main()
