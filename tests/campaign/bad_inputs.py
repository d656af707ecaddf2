"""Inputs that somebody else wrote, or wrote wrongly: keys, sweeps, files, data sets, checkpoints, run folders, costs.

Every program ends well, or with one line and the exit code for a mistake, or with that for samples that failed; within seconds
and without memory to speak of. Each case is made from its number and the seed alone.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from campaign.fork import Child, Ended, preload, specvlm

COUNT, SAMPLE = 2000, 11
MEMORY_MB = 1024  # more than a good run's
SHORT = {"frames": "4", "max_new_tokens": "3", "baseline": "false"}
TEXTS = (
    *("", " ", "null", "true", "???", "~", "nan", "-inf", "1e308", "-1", "0", "1", "0.5", "9" * 23, "9" * 5000),
    *("[1,2]", "{a:1}", "[" * 3000, "(" * 300, "${oc.env:HOME}", "${", "$", "a#b", "a,b", "a=b", "a\\0b", "a\nb", "a\rb", "\t"),
    *("'\"", "it's", "[/bold]", "[red]x", ":smile:", "\x1b[31mred\x07", "\u202eabc", "日本語😀", "x" * 5000, "../../x"),
    *(
        "/dev/zero",
        "chain:99999",
        "1000000000",
        "9x9x9x9x9x9",
        "cuda:99999999999",
        "0/99999999",
        "/",
        ".",
        "~nobody",
        "\\",
        "%s%n",
    ),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 0.5, -0.5, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63, 10**30, 10**4000),
    *("", " ", "x", "\ud800", "\x1b[2J\x07\r", "[/]", "${oc.env:HOME}", "???", "é" * 200, "a\0b", "../../../etc/passwd"),
    *("/dev/zero", [], {}, [None], [[]], {"": None}, {"name": 5}, [1, "a", None], [0] * 5000, {"a": {"b": {"c": []}}}),
)
VIDEOS = ("clip.mp4", "gone.mp4", "n" * 300 + ".mp4", "../out.mp4", "/etc/passwd", "a/../../b.mp4", "\ud800.mp4", ".")
INSERTED = (b"\0", b"\xff\xfe", b"\r", b"\x1b[31m", b"- ", b"{", b'"', b"\n\n")
RANGES = (
    "range(0,100000000)",
    "range(0,1,0)",
    "range(0,1,1e-9)",
    "range(a,b)",
    "choice()",
    "glob(*)",
    "glob([)",
    "interval(0,1)",
)
KEYS = (
    *("ratio", "positions", "mrope", "video", "question", "frames", "fps", "max_pixels", "reader", "max_new_tokens", "seed"),
    *("repetition_penalty", "device", "dtype", "engine", "threads", "baseline", "baselines", "resume", "fail_fast", "shard"),
    *("turn", "record", "check", "target.path", "draft.path", "target.weights", "draft.weights", "target.parallel"),
    *("draft.parallel", "draft.device", "pruner", "drafter", "verifier", "dataset", "tracker", "pair", "experiment", "target"),
    *("hydra.run.dir", "tracker.mode", "nonsense", "pruner.nonsense", "+new", "~ratio", "hydra.job.name"),
)
Json = Any
Action = Callable[[], int]


@dataclass(frozen=True)
class Good:
    """What is spoiled: a run, a sweep of jobs over a data set, a profile's costs; and the memory that good programs take."""

    folder: Path
    peak_mb: int = 0

    def copy(self, name: str, place: Path) -> Path:
        return Path(shutil.copytree(self.folder / name, place / name))


@dataclass(frozen=True)
class Drawing:
    """An action that draws pictures. The engine reserves far more addresses than memory: it is measured, not limited."""

    draw: Callable[[], int]

    def __call__(self) -> int:
        return self.draw()


# ---- spoiling --------------------------------------------------------------------------------------------------------


def spoiled(dice: random.Random, value: Json) -> Json:
    """The same value with one part replaced, removed, or put one level deeper."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if dice.random() < 0.15 else value | {key: spoiled(dice, value[key])}
    if isinstance(value, list) and value and dice.random() < 0.7:
        place = dice.randrange(len(value))
        return [*value[:place], spoiled(dice, value[place]), *value[place + 1 :]]
    return dice.choice([*VALUES, [value], {"x": value}])


def dumped(value: Json) -> str:
    """As JSON; whole numbers of any length, which Python writes no longer than 4300 digits."""
    return json.dumps(value, default=str) if not _long(value) else "1" * 5000


def _long(value: Json) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (type(value) is int and value > 10**100) or any(map(_long, parts))


def torn(dice: random.Random, content: bytes) -> bytes:
    """Bytes of a file, cut, overwritten, or others altogether."""
    place = dice.randrange(len(content) + 1)
    ways = (
        lambda: content[:place],
        lambda: content[:place] + bytes(dice.randrange(256) for _ in range(8)) + content[place + 8 :],
        lambda: content[:place] + dice.choice(INSERTED) + content[place:],
        lambda: b"",
        lambda: dice.choice([b"[", b'{"a":', b"- ", b"&a [*a, "]) * 20_000,
        lambda: content * 3,
        lambda: dice.randbytes(500),
        lambda: bomb(),
    )
    return dice.choice(ways)()


def bomb() -> bytes:
    """YAML of a few lines that stands for a million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    return "\n".join(lines).encode()


def replaced(dice: random.Random, path: Path) -> None:
    """By something that is no such file."""
    path.unlink()
    ways = (
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.touch() or os.truncate(path, 3 << 30),
        lambda: None,
    )
    dice.choice(ways)()


def known(text: str) -> Any:
    """JSON; nothing of what was spoiled before, such as a number of 5,000 digits."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def spoil(dice: random.Random, path: Path) -> str:
    """One file; returns what was done, in a word."""
    way = dice.choice(["parts"] * 6 + ["bytes"] * 3 + ["kind"])
    if way == "kind":
        replaced(dice, path)
    elif way == "bytes" or path.suffix not in (".json", ".jsonl", ".yaml", ".csv"):
        path.write_bytes(torn(dice, path.read_bytes()))
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines() or ["{}"]
        place = dice.randrange(len(lines))
        lines[place] = dumped(spoiled(dice, known(lines[place])))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".yaml":
        content = spoiled(dice, yaml.safe_load(path.read_text()))
        text = dumped(content) if _long(content) else yaml.safe_dump(content, allow_unicode=True)
        path.write_text(text, errors="replace")
    else:
        path.write_text(dumped(spoiled(dice, known(path.read_text()))))
    return f"{path.name}: {way}"


# ---- cases: each spoils something below `place`, and returns words for the reader and what to run ---------------------


def key(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    name, value = dice.choice(KEYS), dice.choice(TEXTS)
    return run_with(place, f"{name}={value}")


def field(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """Of a strategy."""
    from specvlm.strategies import registry

    every = [(kind, name, f.name) for kind, infos in registry.collect().items() for name, i in infos.items() for f in i.fields]
    kind, name, own = dice.choice(every)
    few = ["dataset.scenes=1"] if name == "synthetic" and own != "scenes" else []
    return run_with(place, f"{kind}={name}", *few, f"{kind}.{own}={dice.choice(TEXTS)}")


def sweep(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    names = ("ratio", "seed", "pruner", "drafter.shape", "turn", "shard", "resume", "baselines", "question", "dataset.scenes")
    value = dice.choice([dice.choice(RANGES), ",".join(dice.choices(TEXTS, k=dice.randrange(1, 4)))])
    words = ("dataset=synthetic", "dataset.scenes=1") if dice.random() < 0.5 else ()
    return run_with(place, *words, f"{dice.choice(names)}={value}", sweep=True)


def run_with(place: Path, *words: str, sweep: bool = False) -> tuple[str, Action]:
    taken = {word.partition("=")[0] for word in words}
    where = f"hydra.{'sweep' if sweep else 'run'}.dir={place}/run"
    short = [f"{name}={value}" for name, value in SHORT.items() if name not in taken]
    every = [*(["-m"] if sweep else []), *short, *words, *([] if "hydra.run.dir" in taken else [where])]
    return " ".join(words), specvlm(*every)


def listed(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """The list of a folder of videos."""
    root = place / dice.choice(["data", "da#ta", "da ta, x=y", "日本", "it's", "a'b\"c", "[x]"])
    root.mkdir()
    shutil.copy(good.folder / "clip.mp4", root / "clip.mp4")
    entries: list[dict[str, Json]] = [
        {"video": "clip.mp4", "id": "one", "question": "what?", "answer": "a", "options": ["a", "b"], "start": 0, "end": 1.5},
        {"video": dice.choice(VIDEOS), "id": dice.choice(VALUES)},
    ]
    path = root / dice.choice(["questions.jsonl", "questions.csv"])
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["video", "id", "question", "answer", "options", "start", "end"])
        writer.writeheader()
        writer.writerow(entries[0] | {"options": "a|b", "question": "x" * dice.choice([5, 200_000])})
        path.write_text(text.getvalue())
        if dice.random() < 0.7:
            path.write_bytes(torn(dice, path.read_bytes()))
    else:
        path.write_text("\n".join(map(dumped, entries)) + "\n")
        told = spoil(dice, path)
    what = path.name if path.suffix == ".csv" else told
    words = (f"dataset.root={root}", f"dataset.questions={path.name}")
    return f"{what} in {root.name}", run_with(place, "dataset=folder", *words)[1]


def published(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """The lists of published data sets."""
    sets: Mapping[str, tuple[str, str, list[dict[str, Json]]]] = {
        "long_video_bench": (
            "lvb_val.json",
            "videos/clip.mp4",
            [
                {"id": "a", "video_path": "clip.mp4", "question": "q", "candidates": ["x", "y"], "correct_choice": 0}
                | {"duration": 3.0, "duration_group": 15, "question_category": "c", "topic_category": "t", "level": "l"}
            ],
        ),
        "mlvu": (
            "json/1_plotQA.json",
            "video/1_plotQA/clip.mp4",
            [{"video": "clip.mp4", "question": "q", "duration": 3.0, "candidates": ["x"], "answer": "x", "question_type": "p"}],
        ),
        "mvbench": (
            "json/action_sequence.json",
            "video/star/Charades_v1_480/clip.mp4",
            [{"video": "clip.mp4", "question": "q", "candidates": ["x", "y"], "answer": "x", "start": 0.0, "end": 2.0}],
        ),
    }
    name = dice.choice(list(sets))
    file, video, entries = sets[name]
    root = place / "data"
    for path in (root / file, root / video):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(good.folder / "clip.mp4", root / video)
    (root / file).write_text(json.dumps(entries))
    told = spoil(dice, root / file)
    tasks = {"mlvu": ["dataset.tasks=[plotQA]"], "mvbench": ["dataset.tasks=[action_sequence]"]}.get(name, [])
    return f"{name}: {told}", run_with(place, f"dataset={name}", f"dataset.root={root}", *tasks)[1]


def folder(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """A folder that some program reads back."""
    from specvlm.advise.__main__ import main as advise
    from specvlm.fit_tree import __main__ as fit_tree
    from specvlm.report.__main__ import main as report

    name = dice.choice(["run", "sweep"])
    there = good.copy(name, place)
    files = sorted(path for path in there.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl", ".safetensors"))
    told = spoil(dice, dice.choice(files))
    job = there if name == "run" else dice.choice(sorted({path.parent for path in there.rglob("config.yaml")}))
    out = dice.choice([f"{place}/out.html", f"{place}/out.pdf", f"{place}/no/out.html"])

    def draw() -> int:
        return report([str(there), "-o", out])

    ways: dict[str, Action] = {
        "report": Drawing(draw) if out.endswith(".pdf") else draw,
        "fit_tree": lambda: fit_tree.main([str(job), "--out", f"{place}/tree.json"]),
        "advise": lambda: advise([f"acceptance={job}", f"costs={good.folder}/costs.json", f"hydra.run.dir={place}/advice"]),
        "resume": specvlm("-m", *(f"{k}={v}" for k, v in SHORT.items()), *SWEEP, f"hydra.sweep.dir={there}", "resume=true"),
    }
    way = dice.choice(["report", "report", "fit_tree", "advise", *(["resume"] * 2 if name == "sweep" else [])])
    return f"{way} of a {name}, {told}", ways[way]


SWEEP = ("dataset=synthetic", "dataset.scenes=2", "pruner=two_stage,uniform", "drafter=tree", "drafter.shape=2x1")


def costs(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    from specvlm.advise.__main__ import main as advise

    path = Path(shutil.copy(good.folder / "costs.json", place))
    told = spoil(dice, path)
    accepted = dice.choice(["3.5", "0:4.8,0.9:4", *TEXTS])
    tokens = dice.choice(["tokens=64", f"tokens={dice.choice(TEXTS)}"])
    accepted = accepted if dice.random() < 0.3 else "3.5"
    words = [f"costs={path}", f"acceptance={accepted}", tokens, f"hydra.run.dir={place}/advice"]
    return f"{told} {accepted[:60]} {tokens[:60]}", lambda: advise(words)


def options(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """Of the programs beside the main one."""
    from specvlm.advise.__main__ import main as advise
    from specvlm.fit_tree import __main__ as fit_tree
    from specvlm.report.__main__ import main as report

    text, run, sweep = dice.choice(TEXTS), str(good.folder / "run"), str(good.folder / "sweep")
    ways: tuple[tuple[str, Callable[[list[str]], int], list[str]], ...] = (
        ("report", report, [sweep, "-o", f"{place}/{text[:50]}"]),
        ("report", report, [sweep, "-o", f"{place}/o.html", dice.choice(["--title", "--samples"]), text]),
        ("report", report, [sweep, "-o", f"{place}/o.html", dice.choice(["--job", "--baseline", "--frames"]), text]),
        ("report", report, [text, "-o", f"{place}/o.html"]),
        ("fit_tree", fit_tree.main, [run, "--out", f"{place}/{text[:50]}.json"]),
        ("fit_tree", fit_tree.main, [run, dice.choice(["--nodes", "--depth"]), text, "--out", f"{place}/t.json"]),
        ("fit_tree", fit_tree.main, [dice.choice([text, sweep]), "--out", f"{place}/t.json"]),
        ("advise", advise, [f"costs={good.folder}/costs.json", f"acceptance={text}", f"hydra.run.dir={place}/a"]),
        ("advise", advise, ["acceptance=3", f"costs={text}", f"hydra.run.dir={place}/a"]),
        ("advise", advise, [f"{dice.choice(['drafters', 'tokens', 'check', 'ratio'])}={text}", "costs=x", "acceptance=3"]),
    )
    name, main, words = dice.choice(ways)
    return f"{name} {' '.join(word[-60:] for word in words)}", lambda: main(words)


def shape(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """A tree as a file."""
    path = place / "tree.json"
    path.write_text(json.dumps([[0], [1], [0, 0], [0, 0, 0]]))
    return spoil(dice, path), run_with(place, "drafter=tree", f"drafter.shape={path}")[1]


def preset(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    path = place / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    content = {"ratio": 0.5, "frames": 4, "pruner": {"mass": 0.3}, "question": "what?", "target": {"weights": None}}
    path.write_text(yaml.safe_dump(content))
    told = spoil(dice, path)
    if path.is_file() and path.stat().st_size < 10**6:
        path.write_bytes(b"# @package _global_\n" + path.read_bytes())
    words = ("experiment=mine", *(f"{k}={v}" for k, v in SHORT.items()), f"hydra.run.dir={place}/run")
    return told, specvlm("--config-dir", place / "conf", *words)


def named_video(dice: random.Random, place: Path, good: Good) -> tuple[str, Action]:
    """A video's name, and what lies there."""
    plain = [text for text in TEXTS if len(text) < 200 and "/" not in text and text not in (".", "")]
    path = place / (dice.choice(plain) + dice.choice(["", ".mp4"]))
    what = dice.choice(["clip", "bytes", "kind"])
    if not path.exists():
        shutil.copy(good.folder / "clip.mp4", path)
        if what == "bytes":
            path.write_bytes(dice.choice([path.read_bytes()[: dice.randrange(5000)], dice.randbytes(3000)]))
        elif what == "kind":
            replaced(dice, path)
    reader = dice.choice(["decord", "pyav"])
    return f"{path.name!r}: {what}, {reader}", run_with(place, f"video={path}", f"reader={reader}")[1]


KINDS = (key, key, field, field, sweep, listed, published, folder, folder, folder, costs, options, shape, preset, named_video)

# ---- the campaign ----------------------------------------------------------------------------------------------------


def good_ones(folder: Path) -> Good:
    """Run what is to be spoiled, each in a fork; raises AssertionError where one does not end well."""
    from specvlm.advise.__main__ import main as advise
    from specvlm.report.__main__ import main as report

    shutil.copy(files("specvlm") / "assets" / "clips" / "synthetic_1.mp4", folder / "clip.mp4")
    short = [f"{name}={value}" for name, value in SHORT.items()]
    long = ["frames=4", "max_new_tokens=24", "record=true", "drafter=tree", "drafter.shape=4x2x1"]
    profile = {"drafter": "tree", "shape": "chain:3", "ratio": 0.9, "context": 60, "draft_ms": 3.0, "check_ms": 9.0}
    timings = [profile, profile | {"shape": "paper", "draft_ms": 5.0}, profile | {"shape": "16x1x1", "check_ms": 11.0}]
    starts = [{"drafter": "tree", "ratio": 0.9, "first_s": 0.3, "draft_s": 0.1}]
    alone = {"text": 20, "video": 400, "alone_ms": 8.0, "alone_first_s": 0.2, "machine": "m"}
    (folder / "costs.json").write_text(json.dumps(alone | {"timings": timings, "starts": starts}))
    actions: tuple[Action, ...] = (
        specvlm(*long, f"hydra.run.dir={folder}/run"),
        specvlm("-m", *short, *SWEEP, "record=true", "baseline=true", f"hydra.sweep.dir={folder}/sweep"),
        lambda: report([f"{folder}/sweep", f"{folder}/run", "-o", f"{folder}/report.html"]),
        lambda: advise([f"costs={folder}/costs.json", "acceptance=3.5", f"hydra.run.dir={folder}/advice"]),
    )
    peaks = []
    for number, action in enumerate(actions):
        ended = Child(action, folder / f"good-{number}").wait()
        assert ended.code == 0, ended.err
        peaks.append(ended.peak_mb)
    return Good(folder, max(peaks))


def faults(ended: Ended, good: Good) -> list[str]:
    found = ended.faults()
    if ended.peak_mb > good.peak_mb + MEMORY_MB:
        found.append(f"took {ended.peak_mb} MB, a good run {good.peak_mb}")
    if any(sign in ended.out + ended.err for sign in ("\x1b", "\x07", "\u202e", "this is a bug in specvlm")):
        found.append(f"control characters, or a fault: {ended.err[-200:]!r}")
    return found


def attack(number: int, seed: int, folder: Path, good: Good) -> list[str]:
    kind, dice = KINDS[number % len(KINDS)], random.Random(f"{seed}/{number}")
    place = folder / str(number)
    place.mkdir()
    try:
        words, action = kind(dice, place, good)
        ended = Child(action, place / "child", None if isinstance(action, Drawing) else 12).wait()
    finally:
        for path in place.rglob("*"):  # a file of 3 GB is not to be copied, nor a pipe opened, by whoever tidies up
            if path.is_symlink() or path.is_fifo():
                path.unlink()
        shutil.rmtree(place, ignore_errors=True)
    return [f"{kind.__name__} {seed}/{number}: {words[:160]!r}: {fault}" for fault in faults(ended, good)]


def run(count: int, seed: int) -> list[str]:
    preload()
    for module in (
        "report.page",
        "report.film",
        "report.seen",
        "fit_tree.__main__",
        "advise.__main__",
        "strategies.datasets.video_mme",
    ):
        importlib.import_module(f"specvlm.{module}")
    page = importlib.import_module("specvlm.report.page")
    # Kept for the forks, whose room its engine would take. Made elsewhere: a fork cannot use an engine that has begun here.
    program = "import sys; from specvlm.report.page import bundle; sys.stdout.write(bundle())"
    made = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=True).stdout
    page.bundle = lambda: made  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        good = good_ones(Path(folder))
        return [finding for number in range(count) for finding in attack(number, seed, Path(folder), good)]
