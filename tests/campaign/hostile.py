"""Strategies that attack what runs them, beside innocent jobs and alone: each may cost its own row, and nothing else.

Their tokens are called `identical` only where they are the target's own, as a process without the plugin has them; innocent
jobs have the same rows as without it; who fails is named, in time, and shows in the exit code. The plugin is
`campaign.hostile_plugin`, installed as a third party's is.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from campaign.fork import Child, Ended, preload, specvlm
from campaign.judged import PLUGIN, Rows, answer_faults, ends_of, named, rows_faults, rows_of, summary_of

COUNT, SAMPLE = 120, 3

SHORT = ("frames=4", "max_new_tokens=8")
INNOCENT = {  # by kind: options, as they are chosen, and the names of their classes
    "pruner": {"uniform": "uniform", "two_stage": "two_stage"},
    "drafter": {"chain": "tree", "prompt_lookup": "prompt_lookup"},
    "verifier": {"greedy": "greedy", "sampling": "sampling"},
    "dataset": {"few_scenes": "few_scenes"},  # of the plugin, since it is of two scenes by itself
}
HANG_S = 20  # of the processor: what takes longer hangs
AGAIN_S, WAIT_S = 6, 300  # of the clock: between two interrupts, and until anything must have ended, on a busy machine
CROWD = 5  # hostile strategies in one sweep
IMPORTED = {  # modules whose import is the attack
    "exits": "import sys; sys.exit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "ends_bare": "class Bare(BaseException): pass\nraise Bare",
    "sets_dtype": "import torch; torch.set_default_dtype(torch.float64)",
    "patches_compare": "import specvlm.decoding.lossless as it; it.compare = lambda *a: it.Comparison('mismatch', 0)",
    "patches_argmax": "import torch; was = torch.Tensor.argmax; torch.Tensor.argmax = lambda *a, **k: was(*a, **k) + 1",
    "hook_exits": "import sys\nfrom specvlm import hookimpl\n@hookimpl\ndef specvlm_strategies(): sys.exit(0)",
    "hook_interrupts": "from specvlm import hookimpl\n@hookimpl\ndef specvlm_strategies(): raise KeyboardInterrupt",
}


def run(count: int, seed: int) -> list[str]:
    preload()
    with tempfile.TemporaryDirectory() as name:
        install(Path(name, "site"))
        attacks = list(_attacks(random.Random(seed), count))
        return [f"{what}: {fault}" for n, (what, attack) in enumerate(attacks) for fault in attack(Path(name, str(n)))]


def _attacks(chance: random.Random, count: int) -> Iterator[tuple[str, Callable[[Path], list[str]]]]:
    """What is attacked how, and the attack: a mechanism after the other, and every tenth time a crowd."""
    from campaign.hostile_plugin import FOUND

    by_mechanism = defaultdict(list)
    for cls in chance.sample(FOUND, len(FOUND)):
        by_mechanism[cls.mechanism].append(Alone(cls) if chance.random() < 0.3 and lonely(cls) else Beside([cls], chance))
    by_mechanism["imports"] = [Imported(name) for name in IMPORTED]
    turns = [attack for attack in chain.from_iterable(zip_longest(*by_mechanism.values())) if attack]
    for number in range(count):
        attack = Beside(crowd(FOUND, chance), chance) if number % 10 == 9 else turns[(number - number // 10) % len(turns)]
        yield attack.called, attack


def lonely(cls: type) -> bool:
    """Is its attack one without other jobs, too?"""
    return cls.mechanism not in ("files", "kills") and cls.kind != "dataset"


def crowd(found: Sequence[type], chance: random.Random) -> list[type]:
    """Several of one kind, none of which must end the process."""
    kind = chance.choice(("pruner", "drafter", "verifier"))
    lasting = [cls for cls in found if cls.mechanism not in ("hangs", "kills") and "post_init" not in cls.name]
    return chance.sample([cls for cls in lasting if cls.kind == kind], CROWD)


# ---- the plugin, installed -------------------------------------------------------------------------------------------


def install(site: Path) -> None:
    """Packages as pip would have put them there."""
    shutil.copytree(Path(__file__).parent / "hostile_plugin", site / PLUGIN, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in IMPORTED.items():
        (site / f"{PLUGIN}_{name}.py").write_text(source + "\n")
    for module in (PLUGIN, *(f"{PLUGIN}_{name}" for name in IMPORTED)):
        about, called = site / f"{module}-1.0.dist-info", module.replace("_", "-")
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {called}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[specvlm]\n{called} = {module}\n")
    os.environ["HOSTILE_SITE"] = str(site)


def with_plugin(words: Sequence[str], place: Path, names: Sequence[str], module: str = PLUGIN) -> Child:
    """The command line where the plugin is installed, with these of its strategies."""

    def action() -> int:
        from specvlm.strategies import registry

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with it ignored
        site = os.environ["HOSTILE_SITE"]
        known = {"SPECVLM_PLUGINS": module.replace("_", "-"), "HOSTILE_ONLY": ",".join(names)}
        os.environ.update(known | {"HOSTILE_SIGN": str(place / "sign")})
        sys.path.insert(0, site)
        importlib.invalidate_caches()
        registry.collect.cache_clear()
        return specvlm(*words)()

    place.mkdir(parents=True)
    return Child(action, place / "child")


# ---- attacks ---------------------------------------------------------------------------------------------------------


class Alone:
    """One run of one clip."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.called = f"{cls.mechanism}: {cls.kind}={cls.name} alone"

    def __call__(self, place: Path) -> list[str]:
        words = (*SHORT, f"{self.cls.kind}={self.cls.name}", f"hydra.run.dir={place}/run")
        child = with_plugin(words, place, [self.cls.name])
        if self.cls.mechanism == "hangs":
            return interrupted(child, place, self.cls.name)
        ended = ended_of(child)
        found = summary_of(place / "run")
        faults = ends_of(ended, [self.cls.name])
        if found is None:
            return faults + ["exit code 0, and nothing is written"] * (ended.code == 0)
        faults += answer_faults(found, alone(), ended.code)
        if ended.code == 0 and str(found.get("verdict")).partition(" ")[0] not in ended.out:
            faults.append("exit code 0, and no verdict is shown")
        return faults


class Beside:
    """A sweep with innocent jobs, before and behind: places change with every sample."""

    def __init__(self, classes: Sequence[type], chance: random.Random) -> None:
        self.classes, self.kind = classes, classes[0].kind
        self.names = [cls.name for cls in classes]
        all_of_them = chance.sample(list(INNOCENT[self.kind]), len(INNOCENT[self.kind]))
        few = len(classes) == 1 and classes[0].mechanism != "files"  # which an innocent job must write, and another one read
        self.innocent = all_of_them[:1] if few else all_of_them
        self.options = [self.innocent[0], *self.names, *self.innocent[1:]]
        if few and chance.random() < 0.5:
            self.options.reverse()
        mechanisms = dict.fromkeys(cls.mechanism for cls in classes)
        self.called = f"{' and '.join(mechanisms)}: {self.kind}={','.join(self.options)}"

    def __call__(self, place: Path) -> list[str]:
        child = with_plugin(sweep(self.kind, place, self.options), place, self.names)
        mechanism = self.classes[0].mechanism
        if mechanism == "hangs":
            return interrupted(child, place, self.names[0]) + self.rows_faults(place, whole=False)
        ended = ended_of(child)
        if mechanism == "kills":
            return self.rows_faults(place, whole=False) + self.resumed(place)
        if ended.code == 2 and not list(place.glob("sweep/*/samples*.jsonl")):
            return [f"refused by {ended.err[-300:]!r}"] * (not named(ended.err, self.names) or ended.err.count("\n") > 1)
        faults = ends_of(ended, self.names) + self.rows_faults(place)
        faults += [f"{name} is not on the screen" for name in self.innocent if name not in ended.out]
        return faults + [fault for name in self.names for fault in self.own_faults(place / "sweep", name, ended)]

    def rows_faults(self, place: Path, whole: bool = True) -> list[str]:
        return rows_faults(place / "sweep", self.kind, reference(self.kind, *self.innocent), whole)

    def resumed(self, place: Path) -> list[str]:
        """Without the plugin the sweep can be brought to its end."""
        ended = ended_of(Child(specvlm(*sweep(self.kind, place, self.innocent, "resume=true")), place / "resumed"))
        return ended.faults((0,)) + self.rows_faults(place)

    def own_faults(self, folder: Path, name: str, ended: Ended) -> list[str]:
        """Its rows say what happened, or its job does."""
        mine = {key: row for key, row in rows_of(folder, self.kind)[0].items() if key[0] == name}
        faults = [f"{fault} ({sample})" for (_, sample), row in mine.items() for fault in self.row_faults(sample, row, ended)]
        told = any(name in job.name and (summary_of(job) or {}).get("reason") for job in folder.glob("*/"))
        if len(mine) < 2 and (ended.code == 0 or not told):
            faults.append(f"{name} has {len(mine)} rows of 2, and exit code {ended.code} and its summary say nothing of it")
        return [f"{name}: {fault}" if len(self.names) > 1 else fault for fault in faults]

    def row_faults(self, sample: str, row: dict[str, Any], ended: Ended) -> list[str]:
        if row.get("status") == "ok":
            right = next(row for (_, asked), row in reference("pruner").items() if asked == sample)
            return answer_faults(row, right, ended.code)
        faults = [f"exit code 0 though its row is {row.get('status')} ({row.get('reason')})"] * (ended.code == 0)
        return faults + ["its row has no reason"] * (not row.get("reason"))


class Imported:
    """An innocent sweep where a plugin is installed that attacks when it is imported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.called = f"imports: {name}"

    def __call__(self, place: Path) -> list[str]:
        words = sweep("pruner", place, INNOCENT["pruner"])
        ended = ended_of(with_plugin(words, place, [], f"{PLUGIN}_{self.name}"))
        faults = ends_of(ended, [self.name]) + rows_faults(place / "sweep", "pruner", reference("pruner"))
        return faults + [f"exit code {ended.code}"] * (ended.code != 0)


def sweep(kind: str, place: Path, options: Iterable[str], *more: str) -> tuple[str, ...]:
    """Over two scenes, and these options of a kind."""
    data = () if kind == "dataset" else ("dataset=synthetic", "dataset.scenes=2")
    return ("-m", *data, *SHORT, f"{kind}={','.join(options)}", *more, f"hydra.sweep.dir={place}/sweep")


def ended_of(child: Child, seconds: float = WAIT_S) -> Ended:
    """Killed where it hangs."""
    deadline = monotonic() + seconds
    while not (ended := child.poll()):
        if monotonic() > deadline or cpu_s(child.pid) > HANG_S:
            return child.wait(0)
        sleep(0.05)
    return ended


def cpu_s(pid: int) -> float:
    """Seconds of the processor so far."""
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")


def interrupted(child: Child, place: Path, name: str) -> list[str]:
    """Ctrl-C, up to three times, once it hangs."""
    ended, deadline = None, monotonic() + WAIT_S
    while not (place / "sign").exists() and not (ended := child.poll()) and monotonic() < deadline:
        sleep(0.05)
    if ended:  # it was refused before it could hang
        return ends_of(ended, [name]) + ["exit code 0, though it was to hang"] * (ended.code == 0)
    sleep(0.3)
    for _ in range(3):
        child.signal(signal.SIGINT)
        until = monotonic() + AGAIN_S
        while not (ended := child.poll()) and monotonic() < until:
            sleep(0.05)
        if ended:
            break
    ended = ended or child.wait(1)
    if ended.code is None:
        return ["three interrupts do not end it"]
    faults = [f"interrupted, it ends with exit code {ended.code}"] * (ended.code != 130)
    return faults + [f"interrupted, it does not name the plugin: {ended.err[-200:]!r}"] * (not named(ended.err, [name]))


def reference(kind: str, *options: str) -> Rows:
    """The rows of innocent jobs with these options (none: all), as they are where none but innocent ones take part."""
    names = [INNOCENT[kind][option] for option in options or INNOCENT[kind]]
    return {key: row for key, row in _reference(kind).items() if key[0] in names}


@cache
def _reference(kind: str) -> Rows:
    with tempfile.TemporaryDirectory() as name:
        ended = ended_of(with_plugin(sweep(kind, Path(name), INNOCENT[kind]), Path(name, "job"), []))
        found, faults = rows_of(Path(name, "sweep"), kind)
        assert ended.code == 0 and not faults and len(found) == 2 * len(INNOCENT[kind]), (ended, faults)
        return found


@cache
def alone() -> dict[str, Any]:
    """The summary of a run without any plugin."""
    with tempfile.TemporaryDirectory() as name:
        ended = ended_of(Child(specvlm(*SHORT, f"hydra.run.dir={name}/run"), Path(name, "child")))
        found = summary_of(Path(name, "run"))
        assert ended.code == 0 and found is not None and found["verdict"] == "identical", ended
        return found
