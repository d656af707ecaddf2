"""What the jobs of a sweep are called, on the screen and on the disk."""

import re
from collections.abc import Sequence
from hashlib import sha256

from omegaconf import DictConfig, OmegaConf

from specvlm.results.rows import NO_MATTER

LONGEST = 150  # characters of a folder's name, of the 255 that file systems take


def register() -> None:
    """Make `hydra.sweep.subdir` of conf/config.yaml known to OmegaConf. Can be called again."""
    OmegaConf.register_new_resolver("specvlm_subdir", _subdir, replace=True)


def _subdir(*, _root_: DictConfig) -> str:
    """Of a job over samples by what it is, so that the same job finds its folder again in another sweep, and shards share it;
    of a single run by its number too, since texts and paths are not in its name.
    """
    if OmegaConf.select(_root_, "dataset") is None:
        return f"{_root_.hydra.job.num}_{_root_.hydra.job.override_dirname}"
    return folder_name(_root_.hydra.overrides.task)


def folder_name(words: Sequence[str]) -> str:
    """Of a job with these overrides. What no folder can be called is replaced, and told apart by a checksum."""
    text = label(sorted(words), ",")
    plain = re.sub(r"[^\w.,=+:@-]+", "-", text)
    if plain == text and len(text) <= LONGEST:
        return text or "job"
    return f"{plain[:LONGEST]}-{sha256(text.encode()).hexdigest()[:8]}"


def label(words: Sequence[str], separator: str = " ") -> str:
    """What tells a job from others: its overrides, without those that change no row."""
    words = [re.sub(r"^(dataset\.\w+)='(.*)'$", r"\1=\2", word) for word in words]  # quoted for Hydra alone
    return separator.join(word for word in words if re.split(r"[.=]", word.lstrip("+"), maxsplit=1)[0] not in NO_MATTER)


def apart(labels: Sequence[str]) -> tuple[list[str], str]:
    """Each label without the words that all of them have, and those words."""
    words = [label.split(" ") for label in labels]
    common = [word for word in words[0] if all(word in others for others in words)]
    return [" ".join(word for word in own if word not in common) for own in words], " ".join(common)
