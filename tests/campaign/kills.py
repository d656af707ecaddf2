"""Kill a sweep at random moments, resume it, kill it again: in the end its rows are those of one that ran through."""

from __future__ import annotations

import random
import signal
import tempfile
from pathlib import Path
from time import monotonic, sleep

from campaign.fork import HANG_S, Child, Ended, preload, specvlm
from campaign.sweeps import damage, differences, finish, reference, sweep

COUNT, SAMPLE = 50, 1

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
EXPECTED = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, 0)}  # 0: it had ended already


def run(count: int, seed: int) -> list[str]:
    preload()
    chance, found, broken = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number in range(count):
            folder, number_of_signal = work / f"broken{broken}", SIGNALS[number % len(SIGNALS)]
            ended = killed(folder, work / f"{number}.log", number_of_signal, chance.uniform(0, 0.4) * reference().seconds)
            complaints = ended.faults(EXPECTED[number_of_signal]) + damage(folder)
            if ended.code == 0:
                complaints += differences(folder)
                broken += 1  # the next one begins anew
            found += [f"kill {number} by {number_of_signal.name}: {complaint}" for complaint in complaints]
        ended = finish(work / f"broken{broken}", work / "last.log")
        found += ended.faults(allowed=(0,)) + differences(work / f"broken{broken}")
    return found


def killed(folder: Path, place: Path, number: signal.Signals, after_s: float) -> Ended:
    """Go on with the sweep, and send a signal some time after it has written something."""
    before = written(folder)
    child = Child(specvlm(*sweep(folder, "resume=true")), place)
    deadline = monotonic() + HANG_S
    while written(folder) == before and monotonic() < deadline:
        if ended := child.poll():
            return ended
        sleep(0.003)
    sleep(after_s)
    if ended := child.poll():
        return ended
    child.signal(number)
    return child.wait()


def written(folder: Path) -> int:
    """Bytes of rows and rounds."""
    return sum(path.stat().st_size for path in folder.glob("*/s*.jsonl"))
