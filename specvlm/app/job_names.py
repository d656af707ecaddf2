"""Names of the jobs of a sweep, on screen and on disk."""

import re
from collections.abc import Sequence
from hashlib import sha256

from omegaconf import DictConfig, OmegaConf

from specvlm.results.rows import NEUTRAL_KEYS

LONGEST = 150  # most characters of a folder name before its checksum; file systems take 255 bytes


def register() -> None:
    """Register the resolver that `hydra.sweep.subdir` in conf/config.yaml uses. Safe to call again."""
    OmegaConf.register_new_resolver("specvlm_subdir", _subdir, replace=True)


def _subdir(*, _root_: DictConfig) -> str:
    """Name the folder of a job of a sweep.

    The name of a job over samples has no number, so that a later sweep and other shards reach the same folder. The name
    of a run of one video begins with its number in the sweep. Without it two names could be equal, since they leave out
    texts and paths (`exclude_keys` in conf/config.yaml).
    """
    if OmegaConf.select(_root_, "dataset") is None:
        return f"{_root_.hydra.job.num}_{_root_.hydra.job.override_dirname}"
    return folder_name(_root_.hydra.overrides.task)


def folder_name(words: Sequence[str]) -> str:
    """Make a folder name from the overrides that change results.

    Unusual characters are replaced and a long name is cut; such a name ends in a checksum.
    """
    text = label(sorted(words), ",")
    plain = re.sub(r"[^\w.,=+:@-]+", "-", text)
    if plain == text and len(text) <= LONGEST:
        return text or "job"
    return f"{plain[:LONGEST]}-{sha256(text.encode()).hexdigest()[:8]}"


def label(words: Sequence[str], separator: str = " ") -> str:
    """Label a job by its overrides, without those that change no result (NEUTRAL_KEYS)."""
    words = [re.sub(r"^(dataset\.\w+)='(.*)'$", r"\1=\2", word) for word in words]  # the quotes are for Hydra
    return separator.join(word for word in words if re.split(r"[.=]", word.lstrip("+"), maxsplit=1)[0] not in NEUTRAL_KEYS)


def split_shared(labels: Sequence[str]) -> tuple[list[str], str]:
    """Split off the words that all labels share. Returns the shortened labels, and the shared words as one text."""
    words = [text.split(" ") for text in labels]
    common = [word for word in words[0] if all(word in others for others in words)]
    return [" ".join(word for word in own if word not in common) for own in words], " ".join(common)
