"""Print `specvlm --help`, in full or by group, from the registered strategies and conf/."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from specvlm.app.terminal import Terminal, loading, styled
from specvlm.errors import check_choice
from specvlm.process import collector

Entries = list[tuple[str, str]]  # (name, description) pairs

KINDS = {
    "pruner": "chooses the drafter's video tokens",
    "drafter": "guesses the next tokens",
    "verifier": "accepts or rejects guesses",
    "dataset": "many videos and questions instead of one",
    "metric": "scores the answers of a data set",
    "tracker": "mirrors jobs over a data set",
}
OTHERS = {
    "pair": "the target and the draft",
    "experiment": "predefined sweeps",
    "hydra/launcher": "where the jobs of a sweep run",
}
GROUPS = (*KINDS, *OTHERS, "target", "draft", "preset")
INTRODUCTION = """\
specvlm: lossless speculative decoding for video LLMs

  specvlm KEY=VALUE …             answer a question about a video, or a data set
  specvlm -m KEY=VALUE,VALUE …    a sweep: a job for every combination
  specvlm --help GROUP …          one group in full, such as pruner or target
  specvlm --cfg job KEY=VALUE …   show what would run
  specvlm --version               the version; Hydra's own options: --hydra-help

  specvlm pruner=two_stage ratio=0.9                the embedded pair and clip
  specvlm video=FILE question="What happens?"       any video
  specvlm pair=NAME target.path=… draft.path=…      checkpoints of your own
  specvlm -m 'pruner=glob(*)' ratio=0.5,0.9         every pruner there is
  specvlm verifier=sampling verifier.temperature=0.7

SPECVLM_PLUGIN_TRACEBACK=1 shows where a plugin fails.
"""


def show(words: Sequence[str]) -> None:
    """Print the whole help, or the help of the groups in `words`.

    Raises:
        UserError: A word is not the name of a group.
    """
    groups = [re.split(r"[=.]", word)[0] for word in words]
    for group in groups:
        check_choice("--help", group, GROUPS)
    terminal = Terminal()
    if not groups:  # needs no torch: the user can read it while torch is imported
        terminal.print(INTRODUCTION)
        terminal.file.flush()
    with collector.paused():
        for title, entries in chain.from_iterable(map(on, groups)) if groups else whole():
            table = Table(Column(no_wrap=True), Column(), show_header=False, box=None, padding=(0, 0, 0, 2))
            for name, text in entries:
                table.add_row(styled((name, "cyan")), text)
            terminal.print(styled((title, "bold")), table, "", sep="\n")


def whole() -> Iterator[tuple[str, Entries]]:
    """Yield title and entries of every section of the whole help.

    Lists built-in strategies without their keys, and only package and version of plugins: more would import torch.
    """
    for kind, what in KINDS.items():
        yield f"{kind}=NAME: {what} (more: --help {kind})", [*_at_a_glance(kind), *_presets(kind)]
    if plugins := sorted({f"{point.dist.name} {point.dist.version}" for point in entry_points(group="specvlm") if point.dist}):
        yield f"Plugins, which add more of these (--help {' '.join(KINDS)})", [(plugin, "") for plugin in plugins]
    yield "Model families, by model_type of target.path and draft.path", _families()
    yield from chain.from_iterable(map(on, OTHERS))
    yield from _keys().items()


def on(group: str) -> Iterator[tuple[str, Entries]]:
    """Yield title and entries for one of GROUPS: its strategies with their sources and keys, then its presets.

    "target" and "draft" have keys only, and "preset" is the presets of all groups.
    """
    if group in ("target", "draft"):
        yield f"{group}.KEY=VALUE", [key for key in chain(*_keys().values()) if key[0].startswith(f"{group}.")]
    elif group == "preset":
        yield from ((f"{name}=NAME", there) for name in (*KINDS, *OTHERS) if (there := _presets(name)))
    else:
        yield f"{group}=NAME: {(KINDS | OTHERS)[group]}", [*_strategies(group), *_presets(group)]


def _at_a_glance(kind: str) -> Entries:
    """Name and summary of each built-in strategy, parsed from its file without importing it."""
    files = sorted((Path(__file__).parents[1] / "strategies" / f"{kind}s").glob("*.py"))
    pattern = r'^class \w+\(\w+\):\n    """([^\n"]*)(?:(?!^class ).)*?^    name = "(\w+)"'
    return [found[::-1] for path in files for found in re.findall(pattern, path.read_text(encoding="utf-8"), re.M | re.S)]


def _families() -> Entries:
    """List the built-in model families with their summaries, then the families in packages of this repository.

    Parses files instead of importing them. A package that is not installed is listed with the command that installs it.
    """
    home = Path(__file__).parents[1] / "models"
    text, found = (home / "families.py").read_text(encoding="utf-8"), []
    for name, module, cls in re.findall(r'"(\w+)": "specvlm\.models\.(\w+):(\w+)"', text):
        said = re.search(
            rf'^class {cls}\(\w+\):\n    """(.*?)[.\n"]', (home / f"{module}.py").read_text(encoding="utf-8"), re.M
        )
        found.append((name, said[1] if said else ""))
    there = {point.name for point in entry_points(group="specvlm")}
    for name, package in re.findall(r'"(\w+)": "(specvlm-[\w-]+)"', text):
        found.append((name, f"[{package}]" if package in there else f"needs a package: pip install ./plugins/{package}"))
    return found


def _strategies(kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and description of each strategy of a kind, followed by one indented entry per key.

    Yields nothing for a group that is not a kind of strategy; else imports torch.
    """
    if kind not in KINDS:
        return
    loading()
    from specvlm.strategies import registry

    for name, info in registry.collect()[kind].items():
        yield name, f"{info.summary} [{'; '.join(filter(None, [info.plugin, info.source]))}]"
        for field, key in zip(info.fields, _keys_of(kind, info.fields), strict=True):
            yield f"  {key}", _meaning(info.cls, field.name)


def _keys_of(kind: str, fields: Sequence[dataclasses.Field[Any]]) -> list[str]:
    """Format each field as `kind.field=default`."""
    from specvlm.config import word

    made = (field.default if field.default_factory is dataclasses.MISSING else field.default_factory() for field in fields)
    values = ("(required)" if value is dataclasses.MISSING else word(value) for value in made)
    return [f"{kind}.{field.name}={value}" for field, value in zip(fields, values, strict=True)]


def _meaning(cls: type, field: str) -> str:
    """First sentence about `field` in the docstring of `cls` or of a base class."""
    texts = [base.__doc__ or "" for base in cls.__mro__]
    found = re.search(rf"^ *{field}: (.+?)(\. |\n *\w+: |\n *\n|\Z)", "\n\n".join(texts), re.M | re.S)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _presets(group: str) -> Entries:
    """One entry per YAML file of the group; the first sentence of its leading comment is the description."""
    from specvlm.config import conf_dir

    return [(path.stem, f"{_first_sentence(path)}. [preset]") for path in sorted((conf_dir() / group).glob("*.yaml"))]


def _first_sentence(path: Path) -> str:
    """First sentence of the comment at the top of a YAML file, not counting `# @package`."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package"))
    comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.split(". ")[0].rstrip(".")


def _keys() -> Mapping[str, Entries]:
    """The keys of conf/config.yaml that have a comment, by the title of their block."""
    from specvlm.config import conf_dir

    found: dict[str, Entries] = {}
    for block in (conf_dir() / "config.yaml").read_text(encoding="utf-8").split("\n\n")[1:]:
        above: list[str] = []
        for indent, key, value, comment in re.findall(r"^( *)(\w+):(?: +([^#\n]+?))?(?: # (.*))?$", block, re.M):
            above[len(indent) // 2 :] = [key]
            # The comment describes a default that is computed; ??? means that there is none.
            default = "" if "${" in value or value == "???" else f"={value}"
            if comment:
                found.setdefault(block.split("\n")[0].removeprefix("# "), []).append((f"{'.'.join(above)}{default}", comment))
    return found
