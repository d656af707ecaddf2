"""Generate the reference pages from the code: `python -m docs.generate`, in the repository's folder.

A test compares the committed pages with the generated ones.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import specvlm
from specvlm import config, testing
from specvlm.models import families
from specvlm.results import metrics, scores
from specvlm.strategies import SIGNALS, Strategy, plugins, registry
from specvlm.types import Within

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Made by `python -m docs.generate`: change the code, not this page. -->\n"


def pages() -> dict[Path, str]:
    """Generate all pages: text by path."""
    made = {
        "strategies": strategies(),
        "packages": packages(),
        "keys": keys(),
        "signals": signals(),
        "summary": summary(),
        "api": api(),
    }
    return {REFERENCE / f"{name}.md": f"{NOTE}\n{wrapped(text)}\n" for name, text in made.items()}


def wrapped(text: str) -> str:
    """Wrap paragraphs at 120 characters; leaves headings, tables and directives alone."""
    blocks = [block.strip("\n") for block in text.split("\n\n")]
    prose = re.compile(r"(?![#|:])\S")
    lines = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(lines.fill(block) if prose.match(block) else block for block in blocks)


# ---- strategies ------------------------------------------------------------------------------------------------------


TITLES = {
    "pruner": "Pruners",
    "drafter": "Drafters",
    "verifier": "Verifiers",
    "dataset": "Data sets",
    "metric": "Metrics",
    "tracker": "Trackers",
}


def strategies() -> str:
    """Page of the built-in strategies."""
    parts = [
        "# Strategies\n\nThe built-in ones, by kind. `python -m specvlm --help` lists the same, and those of installed "
        "packages; [packages under `plugins/`](packages.md) have their own page. The last column says how close a "
        "strategy is to the paper it is named after: *exact*, *adapted* (its docstring lists the deviations) or "
        "*inspired by*.",
    ]
    for kind, infos in registry.collect().items():
        ours = [info for info in infos.values() if info.plugin == "specvlm"]
        rows = [row(f"{kind}={info.cls.name}", info.cls) for info in ours]
        parts += [f"## {TITLES[kind]}", table(("name", "what it does", "options", "source"), rows)]
        if kind == "drafter":
            parts.append("The preset `drafter=chain` is `drafter=tree drafter.shape=chain:5`.")
        if kind == "verifier":
            parts.append("`loose` is lossy: its output is not the target's own, and a run says `lossy` as its verdict.")
    parts.append("## Details\n\nFormulas, costs and limits, from the docstrings.")
    for kind, infos in registry.collect().items():
        ours = [info for info in infos.values() if info.plugin == "specvlm"]
        parts += [f"### `{kind}={info.cls.name}`\n\n{docstring(info.cls)}" for info in ours]
    return "\n\n".join(parts)


def packages() -> str:
    """Page of the packages under plugins/."""
    rows, others, brought = [], [], []
    for folder in sorted(file.parent for file in (ROOT / "plugins").glob("specvlm-*/specvlm_*.py")):
        module = module_of(folder)
        models = [f"`{model_type}`" for model_type in plugins.families_of(module)]
        brought += [(f"`{folder.name}`", name, (module.__doc__ or "").split("\n")[0]) for name in models]
        for cls in plugins.strategies_of(module):
            name, what, options, source = row(f"{cls.kind}={cls.name}", cls)
            if cls.kind == "pruner":
                rows.append((f"`{folder.name}`", name, what, options, source))
            else:
                others.append((f"`{folder.name}`", name, what, options))
    return (
        "# Packages under `plugins/`\n\n"
        "Published ways to drop or merge video tokens. They are lossy in their papers; here they change only the drafter's "
        "context, so the output stays the target's own. Each is a separate package: "
        "`pip install ./plugins/specvlm-flashvid` brings `pruner=flashvid`, `make plugins` installs all of them. "
        "By default each follows its paper, as far as a drafter's context allows. "
        "Their docstrings list formulas, costs, limits and deviations.\n\n"
        + table(("package", "name", "what it does", "options", "source"), rows)
        + "\n\n[Results](../results.md#pruners-compared) compares them. Left out, since neither the text of the method "
        "nor its authors' code was available: [KiToke](https://arxiv.org/abs/2604.03414) and "
        "[HieraVid](https://arxiv.org/abs/2604.01881)."
        + "\n\n## Other strategies\n\n"
        + table(("package", "name", "what it does", "options"), others)
        + "\n\n## Model families\n\n"
        + "The others bring a [model family](../write/family.md): checkpoints of its `model_type` load once the package is "
        "installed. Built in are "
        + ", ".join(f"`{name}`" for name in families.specvlm_families())
        + ".\n\n"
        + table(("package", "model_type", "what it is"), brought)
        + "\n\n`specvlm-lmms-eval` brings nothing to specvlm, but specvlm to [lmms-eval](../guides/lmms_eval.md)."
    )


def module_of(folder: Path) -> ModuleType:
    """Import the module of a package under plugins/, installed or not."""
    name = folder.name.replace("-", "_")
    spec = spec_from_file_location(name, folder / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = module = module_from_spec(spec)  # dataclasses look up their types there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def row(option: str, cls: type[Strategy]) -> tuple[str, str, str, str]:
    options = [f"`{field.name}={default(field)}`" for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    source = f"{cls.fidelity}: {linked(cls.paper)}" if cls.paper else "ours" if cls.kind == "pruner" else ""
    return f"`{option}`", first_line(cls), " ".join(options), source


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def default(field: dataclasses.Field[object]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return config.word(field.default_factory())
    return "(required)" if field.default is dataclasses.MISSING else config.word(field.default)


def linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


# ---- keys and signals ------------------------------------------------------------------------------------------------


def keys() -> str:
    """Page of all keys, groups and presets."""
    text = (config.conf_dir() / "config.yaml").read_text(encoding="utf-8")
    bounds = {name: within(hint) for name, hint in get_type_hints(config.RunConfig, include_extras=True).items()}
    del bounds["threads"]  # depends on the machine
    groups, rows, parent = [], [], ""
    for line in text.splitlines():
        if choice := re.match(r"  - (\w+): (\w+)(?: +# (.*))?$", line):
            groups.append((f"`{choice[1]}=`", f"`{choice[2]}`", choice[3] or ""))
        elif opened := re.match(r"(\w+):$", line):
            parent = opened[1]
        elif found := re.match(r"(  )?(\w+): (.*?) +# (.*)$", line):
            if found[1] and parent == "hydra":
                continue
            name = f"{parent}.{found[2]}" if found[1] else found[2]
            rows.append((f"`{name}=`", f"`{found[3]}`", " ".join(filter(None, [found[4], bounds.get(name, "")]))))
    rows += [(f"`{side}.path=`", "of the pair", "a folder written by `save_pretrained`, or `embedded:…`") for side in SIDES]
    presets = [
        (f"`{group}={path.stem}`", comment(path))
        for group in ("pair", "experiment", "drafter", "hydra/launcher")
        for path in sorted((config.conf_dir() / group).glob("*.yaml"))
    ]
    return "\n\n".join(
        (
            "# Keys\n\nOverrides of the form `key=value` for `python -m specvlm`. Defaults are in `conf/config.yaml`.",
            "## Groups\n\nEach selects one part of a run by name. Set the part's own fields as `pruner.mass=0.2`: see "
            "[Strategies](strategies.md).",
            table(("group", "default", "meaning"), groups),
            "## Keys of a run",
            table(("key", "default", "meaning"), rows),
            "## Presets",
            table(("preset", "purpose"), presets),
        )
    )


SIDES = ("target", "draft")


def within(hint: object) -> str:
    bounds = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Within)]
    return f"({'more than ' if bounds[0].above else ''}{bounds[0].low} to {bounds[0].high})" if bounds else ""


def comment(path: Path) -> str:
    """First sentence of a preset's leading comment."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    said = []
    for line in lines:
        if not line.startswith("#"):
            break
        said.append(line.removeprefix("# "))
    return " ".join(said).split(". ")[0].rstrip(".")


def signals() -> str:
    """Page of the signals."""
    rows = [(f"`{name}`", meaning) for name, meaning in SIGNALS.items()]
    return (
        "# Signals\n\nData of the target, the drafter and the video file that a pruner or a drafter may use. Name a signal in "
        '`needs` and read it with `ctx.signal("…")`. Nothing else is recorded.\n\n'
        "Axes: N video tokens, L layers, J KV heads of this process, D the width of the model, T tokens of the text after the "
        "video. `state_layer` and `draft_layers` are attributes of the pruner.\n\n" + table(("signal", "meaning"), rows)
    )


# ---- summary.json ----------------------------------------------------------------------------------------------------


def summary() -> str:
    """Page of summary.json."""
    both = ("key", "meaning")
    return "\n\n".join(
        (
            "# Files of runs and jobs",
            "A run's folder holds `config.yaml`, `steps.jsonl` (a line per round, written as it happens) and `summary.json`. A "
            "job over a data set also has [`samples.jsonl`](../guides/sweeps.md#what-a-job-writes), whose rows have the keys "
            "of a run.",
            "## summary.json",
            table(both, [(f"`{key}`", meaning) for key, meaning in metrics.KEYS.items()]),
            "### Totals of a job",
            "The `summary.json` of a job over samples. It also has the metrics of a run, as means over the samples that have "
            "them, and the keys that are the same for all samples (`strategies`, `versions`, `weights`, `engine`, `parallel`, "
            "`devices`).",
            table(both, [(f"`{key}`", meaning) for key, meaning in metrics.TOTALS.items()]),
            "### Scores",
            "For each metric, `scores` of a job has these keys. A row has the score itself, by metric: `scores` of the "
            "answer and `baseline_scores` of the target's own.",
            table(both, [(f"`{key}`", meaning) for key, meaning in scores.SCORES.items()]),
        )
    )


# ---- the Python API --------------------------------------------------------------------------------------------------


GROUPS = {
    "Sessions": ("load_pair", "Session", "Options", "GenerationResult", "TokenLogprobs", "TextStream", "custom_generate"),
    "Videos": ("read_video", "clip_from_frames", "Clip"),
    "Decode": ("load", "check_pair", "DecodingGraph", "GenerationOptions", "Step", "autoregressive", "compare"),
    "Several requests": ("Scheduler",),
    "Write a strategy": (
        *("Pruner", "PruneContext", "KeepSet", "TokenGrid"),
        *("Drafter", "DraftContext", "DraftSession", "DraftTree", "TreeShape"),
        *("Verifier", "VerifyContext", "Verdict", "Sampling", "gumbel"),
        *("Dataset", "Sample", "VideoPrompt", "Metric", "Answer", "Tracker", "TrackContext", "TrackedRun", "hookimpl"),
    ),
    "Errors": ("UserError",),
}


def api() -> str:
    """Page of the Python API."""
    named = {name for names in GROUPS.values() for name in names}
    public = set(specvlm.__all__) - {"registry"}  # a module, described in the introduction
    assert named == public, f"in no group, or no longer there: {named ^ public}"
    parts = [
        "# Python API\n\nThe names that `from specvlm import …` offers. `specvlm.registry.build(kind, name)` builds strategies."
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        parts += [entry(name, getattr(specvlm, name)) for name in names]
    parts.append("## Contract suites\n\n`specvlm.testing` checks strategies, in a test or from one line of Python.")
    parts += [entry(name, getattr(testing, name)) for name in testing.__all__]
    return "\n\n".join(parts)


def entry(name: str, thing: Any) -> str:
    """Directive that mkdocstrings replaces with heading, signature and docstring."""
    if not hasattr(thing, "__qualname__"):
        return f"### {name}\n\nMarks `specvlm_strategies`, the function of a package that returns its classes."
    return f"::: {thing.__module__}.{thing.__qualname__}"


def docstring(cls: type) -> str:
    """Directive for the docstring alone."""
    options = ("show_root_heading: false", "show_root_toc_entry: false", "members: false")
    return "\n      ".join((f"::: {cls.__module__}.{cls.__qualname__}\n    options:", *options))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
