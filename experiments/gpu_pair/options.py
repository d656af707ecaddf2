"""Command line of the benchmark: keys, defaults, and checks made before any model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf

from experiments.gpu_pair.shapes import pair_of
from specvlm.config import TargetParallel
from specvlm.engine import ENGINES
from specvlm.errors import UserError, did_you_mean
from specvlm.models.checkpoint import DTYPES
from specvlm.parallel import torchrun
from specvlm.types import TreeShape

PARTS = ("copy", "capture", "start", "hf", "rounds", "advise")
ALONE = ("hf", "advise")  # not with tensor parallelism


@dataclass
class Options:
    """Options of the command line. Lists are written with commas: ratio=0.9,0,1."""

    shape: str = "qwen2_5_vl_32b_7b"
    target: str = ""  # a checkpoint folder instead of random weights
    draft: str = ""
    video_tokens: str = "16384"
    ratio: str = "0.9,0,1"  # the first is the main one
    accepted: str = "2,3,4,5"
    draft_weights: str = "bf16"  # among bf16, fp8, int8, int4; bf16 keeps dtype
    target_weights: str = "auto"  # one of them; auto: the shape's own
    tree: str = "paper"
    parallel: str = ""  # over several GPUs: layers (pipelined) or tensor (over torchrun's ranks)
    draft_parallel: str = ""  # with parallel=tensor: empty (draft on rank 0 only) or tensor
    engine: str = "auto"  # auto | eager | graphs
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on a GPU, float32 elsewhere
    prefill: str = "auto"  # real | random (caches filled with random numbers); auto: real up to 32,768 video tokens
    only: str = ",".join(PARTS[:-1])  # advise adds the adviser's predictions; use rounds=20 or more
    rounds: int = 20
    warmup: int = 5
    prefills: int = 3
    limit_s: float = float("inf")  # parts not started by then are skipped and listed
    seed: int = 0
    out: str = str(Path(__file__).with_name("results.jsonl"))
    commit: str = ""  # if git is not available

    @classmethod
    def parse(cls, words: Sequence[str]) -> Options:
        """Parse key=value words. Raises UserError for an unknown key or a value of the wrong type."""
        known = {f.name: type(f.default) for f in fields(cls)}
        for word in words:
            name, equals, _ = word.partition("=")
            if not equals or name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"{word!r} is no key=value of this command; the keys are {', '.join(known)}.{hint}")
        options = cls()
        for name, value in OmegaConf.to_container(OmegaConf.from_cli(list(words))).items():  # type: ignore[union-attr]
            text = ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            try:
                setattr(options, str(name), known[str(name)](text))
            except ValueError:
                raise UserError(f"{name}={text}: expected a number") from None
        options.check()
        return options

    def check(self) -> None:
        """Check values and combinations. Raises UserError."""
        weights = ("bf16", "fp8", "int8", "int4")
        choices = {"draft_weights": weights, "target_weights": ("auto", *weights), "only": PARTS}
        choices |= {"prefill": ("auto", "real", "random"), "dtype": ("auto", *DTYPES), "engine": ENGINES}
        for name, allowed in choices.items():
            for value in getattr(self, name).split(","):
                if value not in allowed:
                    raise UserError(f"{name}={value}: expected {', '.join(allowed)}.{did_you_mean(value, allowed)}")
        for name in ("video_tokens", "ratio", "accepted"):
            self.numbers(name)
        if any(not 0 <= ratio <= 1 for ratio in self.numbers("ratio")):
            raise UserError(f"ratio={self.ratio}: expected shares of the video tokens to drop, from 0 to 1")
        for name in ("rounds", "warmup", "prefills"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        self.check_parallel()
        pair = pair_of(self.shape)
        try:
            depth = TreeShape.parse(self.tree).depth
        except ValueError as error:
            raise UserError(str(error)) from None
        if pair.draft is None and (self.draft_weights != "bf16" or self.draft):
            raise UserError(f"shape={self.shape} has no draft model of its own: leave draft and draft_weights out")
        if pair.draft is not None and bool(self.draft) != bool(self.target):
            raise UserError("target=FOLDER and draft=FOLDER go together: give both, or neither for random weights")
        if not 0 <= min(self.numbers("accepted")) <= max(self.numbers("accepted")) <= depth:
            raise UserError(f"accepted={self.accepted}: tree={self.tree} can have 0 to {depth} accepted")

    def check_parallel(self) -> None:
        """Check the parallel options, and drop parts that tensor parallelism cannot measure. Raises UserError."""
        if self.parallel not in ("", *TargetParallel):
            hint = did_you_mean(self.parallel, TargetParallel)
            raise UserError(f"parallel={self.parallel}: expected {', '.join(TargetParallel)}.{hint}")
        if self.draft_parallel not in ("", "tensor") or (self.draft_parallel and self.parallel != "tensor"):
            raise UserError(f"draft_parallel={self.draft_parallel}: expected tensor, with parallel=tensor, or nothing")
        if (torchrun.size_here() > 1) != (self.parallel == "tensor"):
            raise UserError("parallel=tensor and torchrun go together: torchrun --nproc-per-node 2 -m experiments.gpu_pair …")
        if self.parallel == "layers" and self.target_weights not in ("auto", "bf16"):
            raise UserError("parallel=layers takes target_weights=bf16 alone")
        if self.parallel and self.target:
            raise UserError(f"parallel={self.parallel} makes its own weights: leave target and draft out")
        if self.parallel == "tensor":
            if self.only == Options.only:
                self.only = ",".join(part for part in PARTS if part not in ALONE)
            if asked := [part for part in self.only.split(",") if part in ALONE]:
                raise UserError(f"only={self.only}: {asked[0]} is not measured with parallel=tensor, leave it out")

    def numbers(self, name: str) -> list[float]:
        """Return a list option as numbers. Raises UserError."""
        try:
            return [float(text) for text in getattr(self, name).split(",")]
        except ValueError:
            raise UserError(f"{name}={getattr(self, name)}: expected numbers, with commas between them") from None
