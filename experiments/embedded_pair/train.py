"""Train an embedded pair: `python -m experiments.embedded_pair.train --family qwen2_5_vl --stage vision --size target`.

Stages, each a process of its own, resumable, counted in steps:
  vision  a tower alone, with throw-away heads (once for each size)
  target  the whole target, from its tower
  draft   one or more drafts side by side against the frozen target; `--drafts plain:4000,aware:6000`, kind:steps[:dropout]
Kinds: plain never sees a pruned context; fixed is plain on 16-second videos only; aware sees pruned contexts in most steps.
`--smoke` runs any stage small on a CPU. States for resuming go to --work, bf16 weights and logs to --out.
With `--finish-by` the schedule is as long as the time allows: rates fall by the clock where that is ahead of the steps.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from experiments.embedded_pair.batches import LENGTHS, Batch, Feeder
from experiments.embedded_pair.forward import Forward, maybe_compiled, patches
from experiments.embedded_pair.keepsets import keep_set
from experiments.embedded_pair.learner import Learner, frozen, log
from experiments.embedded_pair.supervision import frame_times, see_accuracy, see_loss, token_labels
from experiments.embedded_pair.tokenizer import FAMILIES
from specvlm.video.synthetic import coverage, draw

RATES = {"vision": 1.5e-3, "target": 1e-3, "draft": 2e-3}
STEPS = {"vision": 2500, "target": 6000}
AWARE_SHARE = 0.6  # of an aware draft's steps on full-length videos
AWARE_POLICIES = {"two_stage": 0.5, "attention": 0.2, "random": 0.2, "uniform": 0.1}
AWARE_COUNTS = (51, 102, 205)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--stage", choices=RATES, required=True)
    parser.add_argument("--size", choices=("target", "draft"), default="target", help="of the vision stage")
    parser.add_argument("--steps", type=int, help="of the vision and target stages")
    parser.add_argument("--drafts", default="plain:4000,aware:4000")
    parser.add_argument("--target", type=Path, help="bf16 target for the draft stage; default --out/target.safetensors")
    parser.add_argument("--tower", type=Path, help="weights whose vision tower to start from; default the vision stage's state")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded_pair"))
    parser.add_argument("--out", type=Path, default=Path("runs/embedded_pair"))
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="save and stop after this long")
    parser.add_argument("--finish-by", type=float, default=float("inf"), help="end the schedule at this time (Unix seconds)")
    parser.add_argument("--save-every", type=float, default=float("inf"), help="save states and weights after so many seconds")
    parser.add_argument("--fresh", action="store_true", help="start without a trained tower, to fill the compiler's cache")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.workers, args.log_every, args.steps = 2, 0, 2, args.steps or 4
        if args.drafts == parser.get_default("drafts"):
            args.drafts = "plain:4,aware:4"
    args.steps = args.steps or STEPS.get(args.stage)
    args.rate = args.rate or RATES[args.stage]
    return args


@torch.no_grad()
def see(batch: Batch, family: str, device: torch.device, fast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Render a batch: patches of all frames, and the labels of its video tokens. fast: compile."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frames = frame_times(batch, family)
    video = draw(batch.objects, batch.backgrounds, frames, dtype, maybe_compiled(coverage, fast)).flatten(0, 1)
    return maybe_compiled(patches, fast)(video, family, dtype), token_labels(batch, family)


class Clock:
    """How much of the schedule the time until `finish_by` has used up. It runs from when the functions are compiled.

    If that was late, the schedule still has 60 % of the time.
    """

    def __init__(self, finish_by: float, used: float) -> None:
        self._end, self._used, self._least = finish_by, used, 0.6 * (finish_by - time.time())
        self._begun = float("inf")

    def start(self) -> None:
        self._begun = time.time()
        self._end = max(self._end, self._begun + self._least)

    def used(self) -> float:
        part = (time.time() - self._begun) / (self._end - self._begun) if self._begun < self._end < float("inf") else 0.0
        return min(1.0, self._used + (1 - self._used) * part)


def build_learners(args: argparse.Namespace, device: torch.device) -> list[Learner]:
    common = {"rate": args.rate, "seed": args.seed, "compiled": device.type == "cuda" and not args.eager}
    if args.stage == "vision":
        name = f"vision_{args.size}"
        return [Learner(args.family, args.size, device, steps=args.steps, name=name, floor=0.2, **common)]
    if args.stage == "target":
        learners = [Learner(args.family, "target", device, steps=args.steps, name="target", **common)]
    else:
        learners = []
        for entry in args.drafts.split(","):
            kind, steps, *dropout = entry.split(":")
            if kind not in ("plain", "fixed", "aware"):
                raise ValueError(f"draft kind {kind!r}: use plain, fixed or aware")
            rate = float(dropout[0]) if dropout else 0.0
            name = "-".join([kind, steps, *dropout])
            learners.append(Learner(args.family, "draft", device, steps=int(steps), name=name, dropout=rate, **common))
    for learner in learners if not args.fresh else ():
        learner.copy_vision(args.tower or args.work / f"vision_{learner.size}.state.safetensors")
    return learners


def vision_step(learner: Learner, batch: Batch, seen, step: int, report: bool) -> dict:
    patch, labels = seen
    video = learner.net.vision(patch, len(batch.ids))[:, : batch.seconds * 64]
    loss = see_loss(learner.heads, video, labels, learner.compiled)
    learner.update(loss, step)
    return {"see": loss.detach()} | (see_accuracy(learner.heads, video, labels) if report else {})


def target_step(learner: Learner, batch: Batch, seen, step: int) -> dict:
    patch, labels = seen
    loss, figures = learner.losses(batch, learner.net.vision(patch, len(batch.ids)), labels, step)
    learner.update(loss, step)
    return figures


def draft_step(learners: list[Learner], target: Forward, batch: Batch, seen, step: int, rng: random.Random) -> dict:
    """Every draft that still has steps left learns from the same batch and the same teacher."""
    patch, labels = seen
    full_length = batch.seconds == 16
    pruned = full_length and rng.random() < AWARE_SHARE and any(x.name.startswith("aware") for x in learners)
    policy = rng.choices(list(AWARE_POLICIES), list(AWARE_POLICIES.values()))[0]
    count = rng.choice(AWARE_COUNTS)
    with torch.no_grad():
        rows = batch.asked if pruned else None
        teacher = target.text(target.vision(patch, len(batch.ids)), batch.ids, batch.seconds, rows=rows)
        keep = None
        if pruned:
            teacher, attention = teacher
            keep = keep_set(policy, attention, count)
        teacher = teacher[:, :-1]
    figures = {}
    for learner in learners:
        kind = learner.name.split("-")[0]
        if step >= learner.steps or (kind == "fixed" and not full_length):
            continue
        video = learner.net.vision(patch, len(batch.ids))
        loss, own = learner.losses(batch, video, labels, step, teacher, keep if kind == "aware" else None)
        learner.update(loss, step)
        figures |= {f"{learner.name}.{k}": v for k, v in own.items()}
    return figures


def main() -> None:
    args = arguments()
    started = time.time()
    index = ["vision", "target", "draft"].index(args.stage)
    seed = 10 * args.seed + 2 * index + (args.size == "draft")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.smoke or not torch.cuda.is_available() else "cuda")
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    states = {}
    first = 0
    names = [f"vision_{args.size}"] if args.stage == "vision" else ["target"] if args.stage == "target" else []
    names = names or ["-".join(entry.split(":")) for entry in args.drafts.split(",")]
    states = {name: args.work / f"{name}.state.safetensors" for name in names}
    resumed = [_saved_step(path) for path in states.values() if path.exists()]
    first = max(resumed, default=0)
    feeder = Feeder(args.family, seed, args.batch, first, args.workers, {16: 1.0} if args.stage == "vision" else LENGTHS)
    learners = build_learners(args, device)
    for learner in learners:
        if states[learner.name].exists():
            learner.load_state(states[learner.name])
    target, fast = None, learners[0].compiled
    if args.stage == "draft":
        target = frozen(args.family, "target", args.target or args.out / "target.safetensors", device, fast)
    journal = args.out / f"{args.stage if args.stage != 'vision' else learners[0].name}.log.jsonl"
    total = max(learner.steps for learner in learners)
    clock = Clock(args.finish_by, max(learner.hurry for learner in learners))
    step, lap, mark, saved = first, time.time(), first, time.time()
    while step < total and clock.used() < 1 and time.time() - started < args.max_seconds:
        rng = random.Random(seed * 10**7 + step)
        torch.manual_seed(seed * 10**7 + step)
        for learner in learners:
            learner.hurry = clock.used()
        batch = feeder.next(device)
        seen = see(batch, args.family, device, fast)
        report = (step + 1) % args.log_every == 0 or step + 1 == total
        if args.stage == "vision":
            figures = vision_step(learners[0], batch, seen, step, report)
        elif args.stage == "target":
            figures = target_step(learners[0], batch, seen, step)
        else:
            figures = draft_step(learners, target, batch, seen, step, rng)
        step += 1
        if report:
            figures = {k: float(v) for k, v in figures.items()}
            pace = (time.time() - lap) / (step - mark) * 1e3
            log(journal, step=step, seconds=time.time() - started, ms_a_step=pace, video=batch.seconds, **figures)
            lap, mark = time.time(), step
        for learner in learners:
            if step == learner.steps or (step < learner.steps and time.time() - saved > args.save_every):
                _finish(learner, states[learner.name], args.out, step)
        if time.time() - saved > args.save_every:
            saved = time.time()
        if step - first == 20:
            log(journal, step=step, seconds=time.time() - started, note="compiled")
            lap, mark = time.time(), step
            clock.start()
    for learner in learners:
        if step < learner.steps:
            _finish(learner, states[learner.name], args.out, step)
    feeder.close()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    ended = step >= total or clock.used() >= 1
    log(journal, step=step, seconds=time.time() - started, peak_gib=peak, note="done" if ended else "stopped early")


def _saved_step(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def _finish(learner: Learner, state: Path, out: Path, step: int) -> None:
    learner.save_state(state, step)
    if not learner.name.startswith("vision"):
        learner.export(out / f"{learner.name}.safetensors")


if __name__ == "__main__":
    main()
