"""Attacks by a data set: what its samples bring."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from specvlm.strategies.datasets.synthetic import SyntheticDataset

from .makers import samples


def own(self):
    return SyntheticDataset.samples(self)


@samples("data sets")
def video_that_exits(self):
    return [own(self)[0], replace(own(self)[1], video=lambda: sys.exit(0))]


@samples("data sets")
def video_that_interrupts(self):
    def video():
        raise KeyboardInterrupt

    return [own(self)[0], replace(own(self)[1], video=video)]


@samples("data sets")
def video_that_is_none(self):
    return [own(self)[0], replace(own(self)[1], video=lambda: None)]


@samples("data sets")
def video_that_edits_itself(self):
    """The frames of a clip that it made before, and keeps."""
    first, second = own(self)
    clip = first.video()

    def video():
        made = second.video()
        clip.frames.zero_()
        return made

    return [replace(first, video=lambda: clip), replace(second, video=video)]


class OddText(str):
    def __hash__(self):
        raise SystemExit(0)


@samples("data sets")
def id_that_exits(self):
    return [own(self)[0], replace(own(self)[1], id=OddText(own(self)[1].id))]


@samples("data sets")
def meta_that_exits(self):
    class Odd:
        def __repr__(self):
            sys.exit(0)

    return [own(self)[0], replace(own(self)[1], meta={"odd": Odd()})]


@samples("data sets")
def samples_that_grow(self):
    class Growing(list):
        def __len__(self):
            return 3

    return Growing(own(self))


@samples("data sets")
def frames_of_floats(self):
    first, second = own(self)

    def video():
        clip = second.video()
        return replace(clip, frames=clip.frames.float() * float("nan"))

    return [first, replace(second, video=video)]


@samples("data sets")
def changes_settings(self):
    torch.set_default_dtype(torch.float64)
    return own(self)
