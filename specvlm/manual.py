"""The text of `python -m specvlm --help`, made from what is registered and from conf/config.yaml."""

import dataclasses
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from specvlm import config, registry
from specvlm.errors import visible

EXAMPLES = """\
  python -m specvlm pruner=two_stage ratio=0.9                 the embedded pair on an embedded clip
  python -m specvlm video=FILE question="What happens?"        any video file
  python -m specvlm pair=qwen2_5_vl_32b_7b target.path=… draft.path=…
  python -m specvlm -m pruner=two_stage,uniform,random ratio=0.5,0.9
  python -m specvlm -m 'pruner=glob(*)'                        every pruner there is
  python -m specvlm -m dataset=synthetic pruner=two_stage,uniform ratio=0.5,0.9
  python -m specvlm verifier=sampling verifier.temperature=0.7
  python -m specvlm --cfg job                                  show what would run"""


def store() -> None:
    """Hand the text to Hydra, which prints it for --help."""
    # Hydra fills in $NAMES and OmegaConf ${…}; ours has neither.
    text = visible(manual()).replace("$", "$$").replace("$${", "\\$${")
    ConfigStore.instance().store(
        group="hydra/help",
        name="specvlm",
        package="hydra.help",
        node={"app_name": "specvlm", "header": "", "footer": "", "template": text},
        provider="specvlm",
    )


def manual() -> str:
    parts = ["specvlm: lossless speculative decoding for video LLMs", EXAMPLES]
    for kind, infos in registry.collect().items():
        entries = [_entry(kind, name, info) for name, info in infos.items()]
        parts.append("\n".join([f"{kind}=NAME", *entries, *map(_preset, _presets(kind))]))
    for group in ("pair", "experiment", "hydra/launcher"):
        parts.append("\n".join([f"{group}=NAME", *map(_preset, _presets(group))]))
    parts.append(
        "tracker=NAME\n  wandb                 Weights & Biases as a mirror of jobs over a data set; " + ", ".join(_wandb())
    )
    text = (config.conf_dir() / "config.yaml").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:(\w+):\n  )?(\w+): (.*?) +# (.*)", text, re.M)  # one level down, as target.weights is
    keys = [(f"{parent}.{key}" if parent else key, value, comment) for parent, key, value, comment in lines]
    parts.append("KEY=VALUE\n" + "\n".join(f"  {f'{key}={value}':<24}  {comment}" for key, value, comment in keys))
    parts.append("Hydra's own options: --hydra-help. A broken plugin: SPECVLM_PLUGIN_TRACEBACK=1 shows where.")
    return "\n\n".join(parts) + "\n"


def _named(name: str) -> str:
    """A name in its column; a long one is followed by a space all the same."""
    return f"  {name:<21} "


def _wandb() -> list[str]:
    return [f"tracker.{f.name}={_default(f)}" for f in dataclasses.fields(config.WandbConfig) if f.name != "name"]


def _presets(group: str) -> list[Path]:
    return sorted((config.conf_dir() / group).glob("*.yaml"))


def _preset(path: Path) -> str:
    """A YAML file; the first sentence of its comment says what it is for."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package"))
    comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    sentence = comment.split(". ")[0].rstrip(".")
    return f"{_named(path.stem)}{sentence}. [preset]"


def _entry(kind: str, name: str, info: registry.StrategyInfo) -> str:
    options = [f"{kind}.{field.name}={_default(field)}" for field in info.fields]
    source = "; ".join(filter(None, [info.plugin, info.source]))
    lines = [f"{_named(name)}{info.summary} [{source}]", *(f"{'':<24}{option}" for option in options)]
    return "\n".join(lines)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return registry.word(field.default_factory())
    return "(required)" if field.default is dataclasses.MISSING else registry.word(field.default)
