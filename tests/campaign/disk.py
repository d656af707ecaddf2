"""A disk that is full, read-only or emptied meanwhile, and processes that share a folder: one line, and resuming mends it."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from time import sleep

from campaign.fork import Child, preload, specvlm
from campaign.sweeps import damage, differences, finish, reference, rows, sweep

COUNT, SAMPLE = 24, 1


def run(count: int, seed: int) -> list[str]:
    preload()
    chance, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, attack in enumerate(islice(cycle(ATTACKS), count)):
            folder = work / f"{number}"
            folder.mkdir()
            found += [f"{attack.__name__} {number}: {complaint}" for complaint in attack(folder, chance)]
    return found


def no_file_is_longer(folder: Path, chance: random.Random) -> list[str]:
    """As on a full disk: from some byte on no file can grow. Then there is room again."""
    most = chance.randrange(500, 16_000)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it is a file here, which cannot grow either
        return specvlm(*sweep(folder / "sweep"))()

    ended = Child(limited, folder / "log").wait(300)
    return ended.faults() + mended(folder)


def disk_fills_up(folder: Path, chance: random.Random) -> list[str]:
    """Something else fills the disk, at a random moment."""
    with disk(folder) as place:
        if place is None:
            return []
        child = Child(specvlm(*sweep(place / "sweep")), folder / "log")
        sleep(chance.uniform(0.2, 4))
        fill(place / "other")
        ended = child.wait(300)
        (place / "other").unlink(missing_ok=True)
        return ended.faults() + mended(place, folder / "resumed")


def disk_is_read_only(folder: Path, chance: random.Random) -> list[str]:
    """A new sweep, and one that is resumed, say so."""
    with disk(folder) as place:
        if place is None:
            return []
        found = finish(place / "sweep", folder / "before", "dataset.scenes=1").faults(allowed=(0,))
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        for number, name in enumerate(("sweep", "new")):
            ended = finish(place / name, folder / f"log{number}")
            found += ended.faults(allowed=(2,))
        return found


def folder_goes_away(folder: Path, chance: random.Random) -> list[str]:
    """The sweep's, a job's or that of the baselines, at a random moment."""
    child = Child(specvlm(*sweep(folder / "sweep")), folder / "log")
    while not list((folder / "sweep").glob("*/samples*.jsonl")) and not (ended := child.poll()):
        sleep(0.02)
    sleep(chance.uniform(0, 3))
    gone = chance.choice([folder / "sweep", folder / "sweep" / "baselines", *(folder / "sweep").glob("pruner*")])
    shutil.rmtree(gone, ignore_errors=True)
    ended = ended or child.wait(300)
    silent = ended.code == 0 and gone.name != "baselines" and rows(folder / "sweep") != reference().rows
    return ended.faults() + [f"rows are lost with {gone.name}, and it ended well"] * silent + mended(folder)


def two_write_one_sweep(folder: Path, chance: random.Random) -> list[str]:
    """Both end well, or one of them is refused; nothing is written twice."""
    one = Child(specvlm(*sweep(folder / "sweep", "resume=true")), folder / "one")
    sleep(chance.uniform(0, 2))
    other = Child(specvlm(*sweep(folder / "sweep", "resume=true")), folder / "other")
    return one.wait(300).faults((0, 2)) + other.wait(300).faults((0, 2)) + damage(folder / "sweep") + mended(folder)


def shards_are_killed(folder: Path, chance: random.Random) -> list[str]:
    """Two processes with a shard each, both killed; then both to the end."""
    shards = [(f"shard={number}/2", folder / f"log{number}") for number in range(2)]
    children = [Child(specvlm(*sweep(folder / "sweep", "resume=true", shard)), log) for shard, log in shards]
    for child in children:
        sleep(chance.uniform(0.2, 3))
        child.signal(signal.SIGKILL)
    found = [fault for child in children for fault in child.wait().faults((-9, 0))]
    for shard, log in shards:
        found += finish(folder / "sweep", log.with_suffix(".again"), shard).faults((0,))
    return found + differences(folder / "sweep")


ATTACKS = (
    *(no_file_is_longer, disk_fills_up, disk_is_read_only),
    *(folder_goes_away, two_write_one_sweep, shards_are_killed),
)


def mended(place: Path, log: Path | None = None) -> list[str]:
    """What a sweep that is resumed in peace has otherwise than one that ran through."""
    return finish(place / "sweep", log or place / "resumed").faults((0,)) + differences(place / "sweep")


@contextmanager
def disk(folder: Path) -> Iterator[Path | None]:
    """A small disk of its own; None where this user may not mount one."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, check=False)
    try:
        yield place if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", place], check=True)


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb") as file:  # even opening it fails on a disk that the sweep has filled
        while True:
            file.write(bytes(1 << 16))
            file.flush()
