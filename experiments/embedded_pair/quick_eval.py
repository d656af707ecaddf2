"""A quick, teacher-forced evaluation on held-out scenes, to choose snapshots: `python -m experiments.embedded_pair.quick_eval`.

Along the target's own greedy answer the draft's rank of every next token decides which tree nodes would have been accepted,
so one forward a context gives the exact number of accepted tokens of any static tree. `evaluate.py` runs the library's loop.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from experiments.embedded_pair.batches import Batch
from experiments.embedded_pair.forward import Forward, patches
from experiments.embedded_pair.keepsets import POLICIES, keep_set
from experiments.embedded_pair.layout import TEXT_ROWS
from experiments.embedded_pair.learner import frozen
from experiments.embedded_pair.supervision import frame_times
from experiments.embedded_pair.tokenizer import END, FAMILIES, PAD, encode, first_question
from specvlm.video.synthetic import CAPTION_QUESTIONS, HELD_OUT, caption, draw, pack, questions, sample_scene

TREE = {(0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (0, 0, 0), (0, 0, 1), (0, 0, 2),
        (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 1)}  # fmt: skip
CHAIN = {(0,) * n for n in range(1, 6)}
CHUNK = 16  # videos a vision pass


def held_out(family: str, kind: str, count: int, first_seed: int, device: torch.device) -> tuple[Batch, list[list[int]]]:
    """Prompts about scenes of at least two objects, and their gold answers as ids."""
    scenes = [sample_scene(first_seed + i, min_objects=2) for i in range(count)]
    assert first_seed + count < HELD_OUT
    if kind == "caption":
        pairs = [(CAPTION_QUESTIONS[i % len(CAPTION_QUESTIONS)], caption(s)) for i, s in enumerate(scenes)]
    else:
        pairs = [questions(s, first_seed + i)[0] for i, s in enumerate(scenes)]
    ids, asked = torch.full((count, TEXT_ROWS), PAD), torch.zeros(count, dtype=torch.long)
    for b, (question, _) in enumerate(pairs):
        head = first_question(family, question)
        ids[b, : len(head)], asked[b] = torch.tensor(head), len(head)
    objects, backgrounds = map(torch.from_numpy, pack(scenes))
    batch = Batch(scenes[0].seconds, objects, backgrounds, ids, torch.zeros(0), asked, asked - 1)
    batch = Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(batch).items()})
    return batch, [[*encode(answer), END] for _, answer in pairs]


@torch.no_grad()
def see_all(nets: list[Forward], batch: Batch, dtype: torch.dtype) -> list[Tensor]:
    """Rows of the video tokens (B, N, W) of every net on the same noisy frames."""
    family, parts = nets[0].family, [[] for _ in nets]
    torch.manual_seed(0)
    for i in range(0, len(batch.ids), CHUNK):
        part = slice(i, i + CHUNK)
        video = draw(batch.objects[part], batch.backgrounds[part], frame_times(batch, family)).flatten(0, 1)
        patch = patches(video, family, dtype)
        for net, out in zip(nets, parts, strict=True):
            out.append(net.vision(patch, len(batch.ids[part]), plain=True))
    return [torch.cat(out) for out in parts]


@torch.no_grad()
def greedy(net: Forward, video: Tensor, batch: Batch, most: int) -> tuple[Tensor, Tensor]:
    """Answers by recomputing the whole text each step: ids (B, R) with the answers filled in, and their ends (B,)."""
    ids, end = batch.ids.clone(), batch.asked.clone()
    row = torch.arange(len(ids), device=ids.device)
    done = torch.zeros_like(end, dtype=torch.bool)
    for i in range(most):
        width = min(TEXT_ROWS, int(end.max()))
        token = net.text(video, ids[:, :width], batch.seconds, plain=True)[row, end - 1].argmax(-1)
        live = ~done & (end < TEXT_ROWS - 1)
        ids[row[live], end[live]] = token[live]
        end = end + live
        done |= (token == END) | (end >= TEXT_ROWS - 1)
        if i % 8 == 7 and bool(done.all()):
            break
    return ids, end


def exact(net: Forward, video: Tensor, batch: Batch, gold: list[list[int]], most: int) -> tuple[float, Tensor, Tensor]:
    """Share of greedy answers that are the gold ones, and `greedy`'s results."""
    ids, end = greedy(net, video, batch, most)
    ours = [ids[b, batch.asked[b] : end[b]].tolist() for b in range(len(gold))]
    return sum(a == b for a, b in zip(ours, gold, strict=True)) / len(gold), ids, end


def accepted(ranks: list[int], nodes: set[tuple[int, ...]]) -> list[int]:
    """Accepted tokens of every round; the first token comes from the target's prefill, a round adds the target's next one."""
    rounds, at = [], 1
    while at < len(ranks):
        depth = 0
        while at + depth < len(ranks) and tuple(ranks[at : at + depth + 1]) in nodes:
            depth += 1
        rounds.append(depth)
        at += depth + 1
    return rounds


@torch.no_grad()
def measure(draft: Forward, video: Tensor, ids: Tensor, begin: Tensor, end: Tensor, seconds: int, keep: Tensor | None) -> dict:
    logits = draft.text(video, ids, seconds, keep=keep, plain=True)[:, :-1]
    rank = (logits > logits.gather(2, ids[:, 1:, None])).sum(-1)  # (B, R - 1)
    ranks = [rank[b, begin[b] - 1 : end[b] - 1].tolist() for b in range(len(ids))]
    mean = lambda nodes: sum(map(sum, r := [accepted(x, nodes) for x in ranks])) / max(1, sum(map(len, r)))  # noqa: E731
    hits = [r == 0 for x in ranks for r in x]
    return {"tree": round(mean(TREE), 3), "chain": round(mean(CHAIN), 3), "agree": round(sum(hits) / len(hits), 4)}


@torch.no_grad()
def evaluate(
    family: str, target: Forward, drafts: dict[str, Forward], count: int, seed: int, ratios: list[float], most: int = 150
) -> dict:
    device = target.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = {}
    for kind in ("caption", "question"):
        batch, gold = held_out(family, kind, count, seed, device)
        seen = see_all([target, *drafts.values()], batch, dtype)
        right, ids, end = exact(target, seen[0], batch, gold, most)
        _, attention = target.text(seen[0], ids, batch.seconds, rows=batch.asked, plain=True)
        total = attention.shape[1]
        entry = {
            "target_exact": right,
            "answer_tokens": float((end - batch.asked).float().mean()),
            "tokens_holding_40_percent": float(((attention.sort(1, descending=True).values.cumsum(1)
                                                 < 0.4 * attention.sum(1, keepdim=True)).sum(1) + 1).float().mean()),
        }  # fmt: skip
        if seen[0].shape[-1] > target.width:
            without = seen[0].clone()
            without[..., target.width :] = 0
            entry["target_exact_without_deepstack"] = exact(target, without, batch, gold, most)[0]
        for (name, draft), video in zip(drafts.items(), seen[1:], strict=True):
            look = lambda keep: measure(draft, video, ids, batch.asked, end, batch.seconds, keep)  # noqa: B023, E731
            rows = {"full": look(None), "text_only": look(torch.zeros(count, 0, dtype=torch.long, device=device))}
            for ratio in ratios:
                torch.manual_seed(seed)
                for policy in POLICIES:
                    rows[f"{policy}@{ratio}"] = look(keep_set(policy, attention, int(total * (1 - ratio))))
            entry[name] = rows
        report[kind] = entry
    return report


def show(report: dict) -> None:
    for kind, entry in report.items():
        print(f"{kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in entry.items() if isinstance(v, float)))
        for name, rows in entry.items():
            if isinstance(rows, dict):
                print(f"  {name:22s}" + " ".join(f"{k} {v['tree']:.2f}" for k, v in rows.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="holds target.safetensors and the drafts' files")
    parser.add_argument("--drafts", default="", help="names, comma-separated; default every other weights file in the folder")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first held-out scene")
    parser.add_argument("--ratios", default="0.9")
    parser.add_argument("--most", type=int, default=150, help="tokens of an answer")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted(p for p in args.folder.glob("*.safetensors") if ".state" not in p.name and p.stem != "target")
    names = [n for n in args.drafts.split(",") if n] or [p.stem for p in files]
    target = frozen(args.family, "target", args.folder / "target.safetensors", device)
    drafts = {n: frozen(args.family, "draft", args.folder / f"{n}.safetensors", device) for n in names}
    ratios = [float(r) for r in args.ratios.split(",")]
    report = evaluate(args.family, target, drafts, args.count, args.seed, ratios, args.most)
    (args.folder / "quick_eval.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
