"""Rows as tables of README.md, between its markers: `python -m experiments.strategies.report`.

A figure is a mean over scenes; what stands behind it in brackets is its 95 % bootstrap interval over scenes. Differences are
taken scene by scene. Verdicts are at ratio 0.9, from the difference's interval.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

from experiments.embedded_pair.evaluate import FAMILIES, interval
from experiments.strategies.cost_table import GPU, NOT_RUN, costs, slowest
from experiments.strategies.evaluate import Row, key_of, read
from experiments.strategies.settings import DRAFTER_PRUNERS, HERE, RATIO, RATIOS, RESULTS, TREE, Setting
from specvlm.errors import UserError

README = HERE / "README.md"
TITLES = {"qwen2_5_vl": "Qwen2.5-VL", "llava_onevision": "LLaVA-OneVision"}
UNIFORM = "uniform"
BOUNDS = {("none", 0.0): "nothing dropped (`none`)", (UNIFORM, 1.0): "all dropped, text only"}
PAIRS = [
    ("flashvid saliency=verifier_attention", "flashvid saliency=vision_attention"),
    ("fastvid saliency=verifier_attention", "fastvid saliency=vision_attention"),
    ("holitom saliency=verifier_attention", "holitom saliency=vision_attention"),
]
STAGE_ONE = [("two_stage mass=auto", "two_stage mass=0.2"), ("two_stage mass=auto", "two_stage")]
CLOSER = [  # what follows its paper more closely, and what was the default before
    ("dart", "dart states=raw"),
    ("flashvid saliency=vision_attention", "flashvid ours"),
    ("memstream", "memstream ours"),
    ("oneclip", "oneclip centres=peaks shares=length"),
    ("streaming", "streaming chunk=1"),
    ("visionzip", "visionzip dominant=0.864"),
]
GROWN = ("entropy_tree", "dynamic_tree nodes=63 depth=8")


class Results:
    """The rows of a family, by setting and scene; of rows for the same thing the last one counts."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows: dict[Setting, dict[int, Row]] = defaultdict(dict)
        self.scenes: dict[int, Row] = {}
        for row in rows:
            if "pruner" in row:
                number, setting = key_of(row)
                self.rows[setting][number] = row
            elif self.scenes.setdefault(row["scene"], row)["answer"] != row["answer"]:
                raise UserError(f"scene {row['scene']} has rows of two different answers: they cannot be compared")

    def values(self, setting: Setting, figure: Callable[[Row], float]) -> dict[int, float]:
        """Of scenes with a round that was not cut short."""
        return {number: figure(row) for number, row in self.rows.get(setting, {}).items() if row["accepted"]}

    def mean(self, setting: Setting, figure: Callable[[Row], float]) -> float:
        return fmean(self.values(setting, figure).values())

    def gaps(self, one: Setting, other: Setting) -> list[float]:
        """Accepted per round, one less the other, of the scenes that both have."""
        mine, theirs = self.values(one, accepted), self.values(other, accepted)
        return [mine[number] - theirs[number] for number in sorted(mine.keys() & theirs.keys())]

    def difference(self, one: Setting, other: Setting) -> tuple[float, float, float] | None:
        """Mean and interval of the gaps; None where there are none."""
        gaps = self.gaps(one, other)
        return interval(gaps) if gaps else None

    def pruners(self) -> list[str]:
        """Those with rows at every ratio, in the order of their rows."""
        found = dict.fromkeys(setting.pruner for setting in self.rows if setting.drafter == TREE)
        return [name for name in found if all(Setting(TREE, name, ratio) in self.rows for ratio in RATIOS)]

    def against_uniform(self, pruner: str, ratio: float = RATIO) -> tuple[float, float, float] | None:
        return self.difference(Setting(TREE, pruner, ratio), Setting(TREE, UNIFORM, ratio))


def accepted(row: Row) -> float:
    return fmean(row["accepted"])


def verdict(low: float, high: float, words: Sequence[str] = ("worse", "no different", "better")) -> str:
    """By where 0 lies: above the interval, in it, below it."""
    return words[0] if high < 0 else words[2] if low > 0 else words[1]


def signed(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def summary(results: dict[str, Results]) -> Iterator[str]:
    """Every pruner with its verdicts, the best first."""
    rows = read(RESULTS / "costs.jsonl")
    times = [slowest(rows, ("cpu", 1)), slowest(rows, GPU)]
    heads = ["pruner", *(head for family in results for head in (TITLES[family], "verdict"))]
    heads += [f"`select` of 16,384 tokens, {where}, ms" for where in ("one CPU thread", "GPU")]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name in order(results):
        cells = [f"`{name}`"]
        for found in results.values():
            gap = found.against_uniform(name)
            mean = f"{found.mean(Setting(TREE, name, RATIO), accepted):.2f}"
            if name == UNIFORM or gap is None:
                cells += [mean if gap else "", ""]
            else:
                word = verdict(*gap[1:])
                cells += [f"{mean}, {signed(*gap)}", f"**{word}**" if word == "better" else word]
        cells += [f"{ms[name]:.1f}" if name in ms else NOT_RUN for ms in times]
        yield f"| {' | '.join(cells)} |"


def order(results: dict[str, Results]) -> list[str]:
    """By the mean difference from uniform over the families."""
    names = list(dict.fromkeys(name for found in results.values() for name in found.pruners()))

    def mean(name: str) -> float:
        return fmean(gap[0] for found in results.values() if (gap := found.against_uniform(name)))

    return sorted(names, key=mean, reverse=True)


def tallies(results: dict[str, Results]) -> Iterator[str]:
    """How many pruners have which verdict, at every ratio."""
    words = ("better", "no different", "worse")
    yield f"| {' | '.join(['', *(f'{ratio:g}' for ratio in RATIOS)])} |"
    yield "|" + "---|" * (len(RATIOS) + 1)
    for family, found in results.items():
        cells = []
        for ratio in RATIOS:
            gaps = [found.against_uniform(name, ratio) for name in found.pruners() if name != UNIFORM]
            said = [verdict(*gap[1:]) for gap in gaps if gap]
            cells.append(", ".join(f"{said.count(word)} {word}" for word in words))
        yield f"| {TITLES[family]} | {' | '.join(cells)} |"


def details(family: str, found: Results) -> Iterator[str]:
    """Everything measured of a family's pruners."""
    exact, lengths = (sum(scene[key] for scene in found.scenes.values()) for key in ("exact", "tokens"))
    count = len(found.scenes)
    yield f"### {TITLES[family]}\n"
    yield f"{count} scenes, {exact} captions exact, {lengths / count:.0f} tokens on average.\n"
    for (name, ratio), said in BOUNDS.items():
        setting = Setting(TREE, name, ratio)
        if setting in found.rows:
            yield f"- {said}: {cell(list(found.values(setting, accepted).values()))}"
    yield ""
    heads = ["pruner", *(f"{ratio:g}" for ratio in RATIOS), "frames", "`select`, ms", "tokens, where fewer"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name in found.pruners():
        cells, frames, times, tokens = [f"`{name}`"], [], [], []
        for ratio in RATIOS:
            setting = Setting(TREE, name, ratio)
            mean, gap = found.mean(setting, accepted), found.against_uniform(name, ratio)
            cells.append(f"{mean:.2f}" if name == UNIFORM or gap is None else f"{mean:.2f}, {signed(*gap)}")
            rows = found.rows[setting].values()
            frames.append(f"{fmean(row['frames'] for row in rows):.0f}")
            times.append(f"{median(row['select_ms'] for row in rows):.1f}")
            tokens.append(fmean(row["kept"] for row in rows))
        budgets = [fmean(row["kept"] for row in found.rows[Setting(TREE, UNIFORM, ratio)].values()) for ratio in RATIOS]
        fewer = any(mine < budget - 0.5 for mine, budget in zip(tokens, budgets, strict=True))
        cells += [" / ".join(frames), " / ".join(times), " / ".join(f"{mean:.0f}" for mean in tokens) if fewer else ""]
        yield f"| {' | '.join(cells)} |"
    yield ""


def cell(values: Sequence[float]) -> str:
    mean, low, high = interval(list(values))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def choices(results: dict[str, Results]) -> Iterator[str]:
    """One setting against another: how much stage I takes, the saliency of three pruners, what follows its paper against what
    was the default before, and merging against leaving out.
    """
    heads = ["", *(head for family in results for head in (TITLES[family], "better", "scenes"))]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    merged = [
        (name.removesuffix(" unmerged"), name)
        for name in dict.fromkeys(setting.pruner for found in results.values() for setting in found.rows)
        if name.endswith(" unmerged")
    ]
    lines = [(one, other, ratio) for one, other in STAGE_ONE + PAIRS + CLOSER for ratio in RATIOS]
    lines += [(*pair, RATIO) for pair in merged]
    for one, other, ratio in lines:
        cells = []
        for found in results.values():
            settings = Setting(TREE, one, ratio), Setting(TREE, other, ratio)
            gap, scenes = found.difference(*settings), str(len(found.gaps(*settings)))
            words = ("the second", "no different", "the first")
            cells += [signed(*gap), verdict(*gap[1:], words), scenes] if gap else [NOT_RUN, "", ""]
        yield f"| `{one}` less `{other}`, {ratio:g} | {' | '.join(cells)} |"


def drafters(family: str, found: Results) -> Iterator[str]:
    """Each drafter at ratio 0.9, beside the paper's tree."""
    yield f"### {TITLES[family]}\n"
    heads = [
        "drafter", "accepted", "tokens per round", "less the paper's tree", "verdict", "checks per token",
        "drafting passes of the target", "target forwards per token", "draft passes per token",
    ]  # fmt: skip
    for pruner in DRAFTER_PRUNERS[1:]:
        heads += [f"with `{pruner}`: accepted", "less the paper's tree", "verdict"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for name in dict.fromkeys(setting.drafter for setting in found.rows):
        setting = Setting(name, UNIFORM, RATIO)
        mean = found.mean(setting, accepted)
        checks, own, draft = (found.mean(setting, per_token(found, key)) for key in ("rounds", "target_passes", "draft_passes"))
        cells = [f"`{name}`", f"{mean:.2f}", f"{1 + mean:.2f}", *against_tree(found, name, UNIFORM)]
        cells[-1] += ", and more target forwards than tokens" if checks + own > 1 else ""
        cells += [f"{checks:.3f}", f"{own:.3f}", f"{checks + own:.3f}", f"{draft:.2f}"]
        for pruner in DRAFTER_PRUNERS[1:]:
            there = Setting(name, pruner, RATIO) in found.rows
            cells += [f"{found.mean(Setting(name, pruner, RATIO), accepted):.2f}" if there else ""]
            cells += against_tree(found, name, pruner) if there else ["", ""]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for pruner in DRAFTER_PRUNERS:
        if gap := found.difference(*(Setting(name, pruner, RATIO) for name in GROWN)):
            yield f"- `{GROWN[0]}` less `{GROWN[1]}`, with `{pruner}`: {signed(*gap)}, {verdict(*gap[1:])}"
    yield ""


def per_token(found: Results, key: str) -> Callable[[Row], float]:
    """Over the tokens behind the first, which the prefill gives."""
    return lambda row: row[key] / (found.scenes[row["scene"]]["tokens"] - 1)


def against_tree(found: Results, name: str, pruner: str) -> list[str]:
    gap = found.difference(Setting(name, pruner, RATIO), Setting(TREE, pruner, RATIO))
    return ["", ""] if gap is None or name == TREE else [signed(*gap), verdict(*gap[1:])]


# ---- the file --------------------------------------------------------------------------------------------------------


def filled(text: str, name: str, lines: Iterator[str]) -> str:
    """The text with what stands between two markers replaced. Raises UserError where they are missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise UserError(f"{README.name} has no markers <!-- {name} --> and <!-- /{name} -->")
    body = "\n".join(lines).rstrip()
    return pattern.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text)


def load(folder: Path = RESULTS) -> dict[str, Results]:
    return {family: Results(rows) for family in FAMILIES if (rows := read(folder / f"{family}_caption.jsonl"))}


def main() -> None:
    results = load()
    text = README.read_text(encoding="utf-8")
    text = filled(text, "summary", summary(results))
    text = filled(text, "tallies", tallies(results))
    text = filled(text, "details", (line for family, found in results.items() for line in details(family, found)))
    text = filled(text, "choices", choices(results))
    text = filled(text, "drafters", (line for family, found in results.items() for line in drafters(family, found)))
    text = filled(text, "costs", costs(read(RESULTS / "costs.jsonl")))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
