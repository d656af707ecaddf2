"""Ways for ranks to end, for test_watch.py: `ending_worker.py HOW FOLDER` under torchrun, or `run` in forks.

No model is loaded, except by `memory_of_a_run`, which is only called in forks.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from time import sleep
from typing import NoReturn

import torch

from specvlm.__main__ import main
from specvlm.app.cli import guarded, leave
from specvlm.errors import OutOfMemory, UserError
from specvlm.parallel import torchrun
from specvlm.parallel.ranks import ProcessGroup, joined

CPU = torch.device("cpu")


def work(ranks: ProcessGroup) -> None:
    """Keep working until a peer is missing."""
    while True:
        ranks.sum(torch.ones(8))
        sleep(0.01)


def same_mistake(ranks: ProcessGroup, folder: Path) -> None:
    raise UserError(f"cuda:{ranks.rank} is not what it was")


def memory_of_the_second(ranks: ProcessGroup, folder: Path) -> None:
    if ranks.rank == 1:
        raise OutOfMemory("cuda:1 ran out of memory")
    work(ranks)


def closed_pipe(ranks: ProcessGroup, folder: Path) -> None:
    if ranks.rank == 0:
        raise SystemExit(1)  # rich's, where nobody reads
    work(ranks)


def first_killed(ranks: ProcessGroup, folder: Path) -> None:
    ranks.sum(torch.ones(8))
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    work(ranks)


def torchrun_killed(ranks: ProcessGroup, folder: Path) -> None:
    (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
    ranks.sum(torch.ones(8))
    if ranks.rank == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    work(ranks)


def second_block(ranks: ProcessGroup, folder: Path) -> None:
    """End in a second block, after a first that ended normally."""
    (folder / "second").touch()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    work(ranks)


def memory_of_a_run(folder: Path) -> int:
    """Run out of memory on rank 1, in the baseline after the warm-up."""
    import specvlm.app.request

    alone, calls = specvlm.app.request.autoregressive, []

    def short(*args, **options):
        calls.append(1)
        for number, step in enumerate(alone(*args, **options)):
            if torchrun.rank_here() == 1 and len(calls) == 2 and number == 3:
                raise torch.OutOfMemoryError("no more")
            yield step

    specvlm.app.request.autoregressive = short
    words = ["target.parallel=tensor", "pair=embedded_llava_onevision", "max_new_tokens=12", f"hydra.run.dir={folder / 'run'}"]
    return main(words)


def ends(how: str, folder: Path) -> int:
    if how == "second_block":
        before = signal.getsignal(signal.SIGTERM)
        for _ in range(2):
            with joined(CPU) as ranks:
                ranks.sum(torch.ones(8))
            assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
            assert not [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and "pidfd" in os.readlink(fd)]
    with joined(CPU, lambda: "; 7 tokens are saved") as ranks:
        globals()[how](ranks, folder)
    return 0


def run(how: str, folder: Path) -> NoReturn:
    leave(lambda: guarded(lambda: ends(how, folder), full=False))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
