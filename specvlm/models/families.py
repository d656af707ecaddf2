"""Model families by Hugging Face's `model_type`: the built-in ones, and those of installed plugins.

A family's module is imported when a checkpoint of its type is loaded, and plugins only if no built-in family fits.
"""

import hashlib
import importlib
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specvlm.errors import UserError, did_you_mean, one_line
from specvlm.models import plugins
from specvlm.models.guard import guard
from specvlm.models.plugins import PluginError, hookimpl

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

# Packages under plugins/ that provide families, for messages and the help.
PACKAGES = {
    "glm46v": "specvlm-glm4v",
    "glm4v": "specvlm-glm4v",
    "glm4v_moe": "specvlm-glm4v",
    "internvl": "specvlm-internvl",
    "llava_next_video": "specvlm-llava-next-video",
    "qwen2_vl": "specvlm-qwen2-vl",
    "smolvlm": "specvlm-smolvlm2",
    "video_llama_3": "specvlm-video-llama-3",
}


class Source(NamedTuple):
    """Where a family's class is ("module:Class"), and the label of the package that provides it."""

    place: str
    plugin: str


@hookimpl
def specvlm_families() -> dict[str, str]:
    """Return the built-in families."""
    return {
        "llava_onevision": "specvlm.models.llava_onevision:LlavaOneVision",
        "qwen2_5_vl": "specvlm.models.qwen2_5_vl:Qwen2_5_VL",
        "qwen3_vl": "specvlm.models.qwen3_vl:Qwen3VL",
        "qwen3_vl_moe": "specvlm.models.qwen3_vl:Qwen3VLMoe",
    }


def find(model_type: str) -> "type[VideoLM]":
    """Import the family of a `model_type`.

    Raises:
        UserError: There is no such family. The message lists the known ones, and the package that provides this one.
        PluginError: The package that provides it is broken.
    """
    own = specvlm_families()
    if model_type in own:
        return _imported(model_type, Source(own[model_type], "specvlm"))
    known = sources()
    if model_type in known:
        return _imported(model_type, known[model_type])
    there = f"model type {model_type!r} is not supported; supported are {', '.join(sorted(known))}"
    if model_type in PACKAGES:
        raise UserError(f"{there}. A package of this repository provides it: {pip_line(model_type)}")
    raise UserError(f"{there}.{near}" if (near := did_you_mean(model_type, known)) else there)


def pip_line(model_type: str) -> str:
    """Return the command that installs the package of this repository that provides a family."""
    return f"pip install ./plugins/{PACKAGES[model_type]}"


@cache
def sources() -> dict[str, Source]:
    """Collect the built-in families and those of all plugins. If two have the same name, the first one is kept."""
    found: dict[str, Source] = {}
    for plugin in plugins.load():
        for model_type, place in plugin.families.items():
            source = Source(place, plugin.label)
            if model_type in found:
                kept = found[model_type].plugin
                plugins.report(plugin.label, f'defines model family "{model_type}", but {kept} has it already')
            found.setdefault(model_type, source)
    return found


def _imported(model_type: str, source: Source) -> "type[VideoLM]":
    """Import a family's class and check it. Raises PluginError."""
    from specvlm.models.video_lm import VideoLM

    module, _, name = source.place.partition(":")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise PluginError(f"{source.plugin}: model family {source.place} cannot be imported: {one_line(error)}") from error
    if not isinstance(cls, type) or not issubclass(cls, VideoLM):
        raise PluginError(f"{source.plugin}: {source.place} is not a class derived from specvlm.models.video_lm.VideoLM")
    if missing := [name for name in ("family", "axes") if not hasattr(cls, name)] + sorted(cls.__abstractmethods__):
        raise PluginError(f"{source.plugin}: {source.place} does not define {', '.join(missing)}")
    if cls.family != model_type:
        raise PluginError(f"{source.plugin}: {source.place} has family = {cls.family!r}, but is registered as {model_type!r}")
    guard(cls)
    return cls


def version_of(cls: "type[VideoLM]") -> str:
    """Identify the code of a family: its name and version, and a hash of the files that define its classes."""
    modules = {sys.modules[base.__module__] for base in cls.__mro__ if hasattr(base, "family") or base is cls}
    files = sorted(file for module in modules if (file := getattr(module, "__file__", None)))
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]
    return " ".join(filter(None, (cls.family, cls.version, code)))
