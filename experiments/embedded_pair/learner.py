"""One model under training: optimiser, schedule, losses on a batch, and checkpoint files that a later run resumes from."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.embedded_pair.batches import Batch
from experiments.embedded_pair.forward import Forward
from experiments.embedded_pair.models import build, load_weights, weights
from experiments.embedded_pair.supervision import build_heads, gather_loss, recall_loss, see_loss

DISTILL = 0.6  # share of KL to the target in a draft's loss; the rest is cross entropy with the gold answer


class Learner:
    """A model of one size, trained for `steps` steps with a warm-up and a cosine down to `floor` of `rate`.

    Attributes:
        hurry: Share of the schedule that the clock has used up. The schedule follows it where it is ahead of the steps.
    """

    def __init__(self, family, size, device, *, steps, rate, seed, name, dropout=0.0, floor=0.02, compiled=False):
        self.name, self.size, self.steps, self.rate, self.floor = name, size, steps, rate, floor
        self.compiled, self.hurry, self.fused = compiled, 0.0, device.type == "cuda"
        model = build(family, size, seed).to(device).train()
        self.net = Forward(model, family, self.compiled, dropout)
        self.heads = build_heads(model.config.text_config.hidden_size, seed + 50).to(device)
        layers = len(self.net.blocks)
        self.taps = (layers // 2 - 1, layers - 2) if size == "target" else (0,)
        self.parameters = dict(model.named_parameters()) | {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        decayed = [p for n, p in self.parameters.items() if p.ndim >= 2 and not n.startswith("heads.")]
        others = [p for n, p in self.parameters.items() if p.ndim < 2 or n.startswith("heads.")]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.98), fused=self.fused,
        )  # fmt: skip

    def progress(self, step: int) -> float:
        """The share of the schedule, 0 to 1, that is done after `step` steps."""
        return min(1.0, max(step / self.steps, self.hurry))

    def losses(self, batch: Batch, video: Tensor, labels, step: int, teacher=None, keep=None) -> tuple[Tensor, dict]:
        """The loss on one batch and detached figures for the log; with `keep` the context is pruned."""
        logits, tapped = self.net.text(video, batch.ids, batch.seconds, keep=keep, taps=self.taps)
        logits, target, mark = logits[:, :-1], batch.ids[:, 1:], batch.answer[:, 1:]
        mean = lambda each: (each * mark).sum() / mark.sum()  # noqa: E731
        cross = mean(F.cross_entropy(logits.transpose(1, 2), target, reduction="none"))
        loss = cross
        if teacher is not None:
            gap = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            loss = (1 - DISTILL) * cross + DISTILL * mean(gap)
        weight = max(0.1, 1 - 1.1 * self.progress(step))
        grid = batch.seconds * 64  # LLaVA's newline token has no place in the grid
        extra = 0.5 * see_loss(self.heads, video[:, :grid], labels, self.compiled)
        if keep is None:
            rows = tapped[0].index_select(1, self.net.video_slots(batch.seconds)[:grid])
            extra = extra + 0.3 * recall_loss(self.heads, rows, labels, self.compiled)
        if len(self.taps) == 2:
            extra = extra + 0.3 * gather_loss(self.heads, tapped[1][:, -batch.ids.shape[1] :], batch)
        with torch.no_grad():
            right = (logits.argmax(-1) == target).float() * mark
            exact = (right == mark).all(1).float().mean()
            figures = {"ce": cross.detach(), "accuracy": right.sum() / mark.sum(), "exact": exact}
        return loss + weight * extra, figures

    def update(self, loss: Tensor, step: int) -> None:
        loss.backward()
        present = [p for p in self.parameters.values() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(present, 1.0, foreach=True)
        shape = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (step + 1) / 200) * shape
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def copy_vision(self, path: Path) -> None:
        """Start from the vision tower and `see` head of a vision-only run's state, or from the tower of exported weights."""
        wanted = ("visual", "vision_tower", "multi_modal_projector", "heads.see")
        with safe_open(path, "pt") as file, torch.no_grad():
            state = any(name.startswith("p.") for name in list(file.keys()))
            for name, parameter in self.parameters.items():
                if state and any(w in name for w in wanted):
                    parameter.copy_(file.get_tensor(f"p.{name}"))
                elif not state and any(w in name for w in wanted[:3]):
                    parameter.copy_(file.get_tensor(name.replace(".vision_model.", ".")))

    def save_state(self, path: Path, step: int) -> None:
        """Weights, heads and both moments in fp32, to resume from."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"p.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state.get(parameter, {}):
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        temporary = path.with_suffix(".part")
        metadata = {"step": str(step), "hurry": str(self.hurry)}
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        temporary.replace(path)

    def load_state(self, path: Path) -> int:
        """Continue from a state file; returns the step it was saved at."""
        with safe_open(path, "pt") as file, torch.no_grad():
            step, names = int(file.metadata()["step"]), set(file.keys())
            self.hurry = float(file.metadata().get("hurry", 0.0))
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"p.{name}"))
                if f"exp_avg.{name}" in names:
                    self.optimizer.state[parameter] = {
                        # fused AdamW keeps its counter on the device
                        "step": torch.tensor(float(step), device=parameter.device if self.fused else "cpu"),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device),
                    }
        return step

    def export(self, path: Path) -> None:
        """The bf16 weights alone."""
        state = {n: t.detach().to(torch.bfloat16).cpu().contiguous() for n, t in weights(self.net.model).items()}
        temporary = path.with_suffix(".part")  # whoever copies the file while training goes on finds a whole one
        save_file(state, temporary, {"format": "pt"})
        temporary.replace(path)


def frozen(family: str, size: str, path: Path, device: torch.device, compiled: bool = False) -> Forward:
    """A trained model as exported, for teaching or evaluation."""
    model = build(family, size).to(device).eval().requires_grad_(False)
    with safe_open(path, "pt") as file:
        load_weights(model, {n: file.get_tensor(n) for n in list(file.keys())})
    return Forward(model, family, compiled)


def log(file: Path, **figures) -> None:
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()})
    print(line, flush=True)
    with file.open("a") as out:
        out.write(line + "\n")
