"""What training asks of the models beside the answers: linear heads that are thrown away afterwards.

`see` reads every video token, with what DeepStack adds to it: is there an object, its shape, colour, size and centre, the
cell's own place, the background.
`recall` reads video tokens after a middle layer: when and where did the object in this cell first appear, what second is it.
`gather` reads the last question rows after a late layer: for every colour, is there an object, when, where, what.
They teach a tower to look and the text layers to look back; without `see` shapes stayed near chance in the first minutes.

Legend: B videos, T tokens a video, U = B * T, K object slots, W as in forward.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.embedded_pair.batches import Batch
from experiments.embedded_pair.forward import linear, maybe_compiled
from experiments.embedded_pair.layout import CELLS
from experiments.embedded_pair.tokenizer import QWEN
from specvlm.video.synthetic import COLOR_NAMES, FPS, MAX_OBJECTS, RADII, SECONDS, SIDE, Col, centers

SEE = {"object": 1, "shape": 8, "color": 8, "size": 3, "center": 2, "cell": 2, "background": 6, "texture": 3}
RECALL = {"second": 14, "start": 9, "order": MAX_OBJECTS, "now": SECONDS}
GATHER = {"present": 1, "second": 14, "start": 9, "stop": 9, "shape": 8}


def build_heads(width: int, seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    sizes = {"see": sum(SEE.values()), "recall": sum(RECALL.values()), "gather": len(COLOR_NAMES) * sum(GATHER.values())}
    return nn.ModuleDict({name: nn.Linear(width, out) for name, out in sizes.items()})


def frame_times(batch: Batch, family: str) -> Tensor:
    """Frame numbers at 2 fps that the family looks at: all for Qwen, every other one for LLaVA-OneVision."""
    step = 1 if family in QWEN else FPS
    return torch.arange(0, FPS * batch.seconds, step, device=batch.objects.device).float()


@torch.no_grad()
def token_labels(batch: Batch, family: str) -> dict[str, Tensor]:
    """Labels (U,) or (U, 2) of every grid token; a token belongs to the nearest object whose box touches its cell."""
    objects, device, cells = batch.objects, batch.objects.device, CELLS * CELLS
    second = torch.arange(batch.seconds, device=device)
    center = centers(objects, frame_times(batch, family))
    if family in QWEN:  # a token holds two frames
        center = center.unflatten(2, (-1, 2)).mean(3)
    first, last = objects[..., Col.FIRST, None], objects[..., Col.LAST, None]
    visible = (objects[..., Col.ON, None] > 0) & (FPS * second >= first) & (FPS * second < last)  # (B, K, F)
    line = (torch.arange(CELLS, device=device) + 0.5) * SIDE / CELLS
    cell = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(cells, 2)
    away = (cell - center[:, :, :, None]).abs().amax(-1)  # (B, K, F, cells)
    radius = torch.tensor(RADII, device=device)[objects[..., Col.SIZE].long()][:, :, None, None]
    touches = (away < SIDE / CELLS / 2 + radius - 3) & visible[..., None]
    nearest, owner = torch.where(touches, away - radius, 1e4).min(1)  # (B, F, cells)
    found = nearest < 1e3
    flat = owner.flatten(1)
    column = lambda c: objects[..., c].gather(1, flat).flatten().long()  # noqa: E731
    now = second.repeat_interleave(cells).repeat(len(objects))
    whole = lambda c: batch.backgrounds[:, c].repeat_interleave(batch.seconds * cells)  # noqa: E731
    return {
        "object": found.flatten().float(),
        "shape": column(Col.SHAPE),
        "color": torch.where(FPS * now >= column(Col.TURN_FRAME), column(Col.TURN), column(Col.COLOR)),
        "size": column(Col.SIZE),
        "center": center.permute(0, 2, 1, 3).gather(2, owner[..., None].expand(-1, -1, -1, 2)).reshape(-1, 2) / SIDE,
        "cell": cell.repeat(len(objects) * batch.seconds, 1) / SIDE,
        "background": whole(0),
        "texture": whole(1),
        "second": column(Col.SECOND),
        "start": column(Col.START),
        "order": flat.flatten(),
        "now": now,
    }


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def _see_loss(tokens_UD: Tensor, weight: Tensor, bias: Tensor, y: dict[str, Tensor]) -> Tensor:
    z = dict(zip(SEE, linear(tokens_UD, weight, bias).float().split(list(SEE.values()), -1), strict=True))
    on, count = y["object"], y["object"].sum() + 1
    kinds = sum(_cross_entropy(z[k], y[k]) for k in ("shape", "color", "size"))
    loss = 2 * F.binary_cross_entropy_with_logits(z["object"][:, 0], on) + (kinds * on).sum() / count
    loss = loss + 3 * ((z["center"] - y["center"]).abs().sum(-1) * on).sum() / count
    loss = loss + 3 * (z["cell"] - y["cell"]).abs().sum(-1).mean()
    return loss + 0.3 * sum(_cross_entropy(z[k], y[k]).mean() for k in ("background", "texture"))


def _recall_loss(tokens_UD: Tensor, weight: Tensor, bias: Tensor, y: dict[str, Tensor]) -> Tensor:
    z = dict(zip(RECALL, linear(tokens_UD, weight, bias).float().split(list(RECALL.values()), -1), strict=True))
    about = sum(_cross_entropy(z[k], y[k]) for k in ("second", "start", "order")) * y["object"]
    return about.sum() / (y["object"].sum() + 1) + _cross_entropy(z["now"], y["now"]).mean()


def together(rows_BTW: Tensor, width: int) -> Tensor:
    """What enters the text model plus all that DeepStack adds, (B, T, D): so `see` teaches every level to carry its part."""
    return rows_BTW if rows_BTW.shape[-1] == width else rows_BTW.unflatten(-1, (-1, width)).sum(2)


def see_loss(heads: nn.ModuleDict, rows_BTW: Tensor, labels: dict[str, Tensor], compiled: bool) -> Tensor:
    head = heads["see"]
    tokens = together(rows_BTW, head.in_features)
    return maybe_compiled(_see_loss, compiled)(tokens.flatten(0, 1), head.weight, head.bias, labels)


def recall_loss(heads: nn.ModuleDict, tokens_BTD: Tensor, labels: dict[str, Tensor], compiled: bool) -> Tensor:
    head = heads["recall"]
    return maybe_compiled(_recall_loss, compiled)(tokens_BTD.flatten(0, 1), head.weight, head.bias, labels)


@torch.no_grad()
def see_accuracy(heads: nn.ModuleDict, rows_BTW: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of object tokens whose shape, colour and size are read right."""
    tokens = together(rows_BTW, heads["see"].in_features)
    z = dict(zip(SEE, heads["see"](tokens.flatten(0, 1).float()).split(list(SEE.values()), -1), strict=True))
    on = labels["object"]
    return {k: (((z[k].argmax(-1) == labels[k]) * on).sum() / on.sum()).item() for k in ("shape", "color", "size")}


def _by_color(batch: Batch, column: Col) -> Tensor:
    """A column of the objects (B, 3, colours), indexed by the object's colour; 0 for colours that are absent."""
    on, color = batch.objects[..., Col.ON].long(), batch.objects[..., Col.COLOR].long()
    table = torch.zeros(len(on), len(COLOR_NAMES), dtype=torch.long, device=on.device)
    return table.scatter_add_(1, color, batch.objects[..., column].long() * on)[:, None].expand(-1, 3, -1)


def gather_loss(heads: nn.ModuleDict, text_BRD: Tensor, batch: Batch) -> Tensor:
    """On the last three question rows of those conversations that begin with the caption."""
    rows = torch.stack([batch.count_row - i for i in range(3)], 1).clamp(min=0)
    picked = text_BRD.gather(1, rows[..., None].expand(-1, -1, text_BRD.shape[-1])).float()
    z = heads["gather"](picked).view(len(rows), 3, len(COLOR_NAMES), -1)
    z = dict(zip(GATHER, z.split(list(GATHER.values()), -1), strict=True))
    asked = (batch.count_row >= 0).float()[:, None, None]
    present = _by_color(batch, Col.ON).float()
    count = asked.sum() * 3 + 1e-6
    loss = (F.binary_cross_entropy_with_logits(z["present"][..., 0], present, reduction="none") * asked).sum() / (count * 8)
    for name in ("second", "start", "stop", "shape"):
        each = F.cross_entropy(z[name].movedim(-1, 1), _by_color(batch, Col[name.upper()]), reduction="none")
        loss = loss + (each * present * asked).sum() / (count * 3)
    return loss
