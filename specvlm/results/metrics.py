"""From the steps of a request to the figures of its summary. Every key of summary.json is explained here."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specvlm.types import Step

KEYS = {
    "verdict": "identical, identical (exact by construction), numeric tie at token K (gap G), MISMATCH at token K: why, "
    "sampled, lossy, or not checked (no baseline, or out of memory)",
    "text": "the answer, special tokens left out",
    "token_ids": "ids of the answer, the stop id included",
    "baseline_token_ids": "ids of the target's own answer, from `autoregressive`; null without a baseline",
    "prompt_tokens": "all tokens of the prompt",
    "video_tokens": "video tokens of the prompt",
    "kept_tokens": "video tokens the drafter saw; null when no drafter was started",
    "new_tokens": "length of token_ids",
    "rounds": "checks of the target after the prefill",
    "accepted_per_round": "guesses accepted a round, the bonus token not counted (the paper's tau), of rounds that no stop id "
    "or token limit cut short; null when there is none",
    "tokens_per_round": "accepted_per_round + 1",
    "drafted_per_round": "guesses checked a round, of the same rounds",
    "acceptance_by_depth": "share of the same rounds that accepted at least 1, 2, 3 … guesses, to the depth of the tree",
    "time_to_first_token_s": "embed + prefill, seconds",
    "drafter_start_s": "prune + the drafter's own prefill, after the first token; 0 where nothing is drafted",
    "decode_s": "all rounds: drafting and checking, both prefills left out (the paper's measure)",
    "end_to_end_s": "time_to_first_token_s + drafter_start_s + decode_s; reading the video is in times_s.video",
    "file_to_first_token_s": "wall time from opening the file to the first token: times_s.video + time_to_first_token_s; "
    "loading the models, warming up and capturing are left out",
    "file_to_last_token_s": "wall time from opening the file to the last token: times_s.video + end_to_end_s; "
    "the same left out",
    "tokens_per_second": "tokens after the first, over drafter_start_s + decode_s",
    "baseline_decode_s": "the same of `autoregressive`",
    "baseline_end_to_end_s": "the same of `autoregressive`",
    "baseline_file_to_first_token_s": "the same of `autoregressive`, behind the same times_s.video",
    "baseline_file_to_last_token_s": "the same of `autoregressive`, behind the same times_s.video",
    "speedup_decode": "baseline_decode_s / decode_s",
    "speedup_end_to_end": "baseline_end_to_end_s / end_to_end_s",
    "speedup_file_to_last_token": "baseline_file_to_last_token_s / file_to_last_token_s: of all that is waited for",
    "times_s": "seconds by part: video (reading and preprocessing, as it took; rows that share a reading each have it, "
    "and one done ahead counts in full), embed, prefill, prune, draft_prefill, draft, verify; capture where the engine met a "
    "new shape of tree, or a new cache, in the middle of the request",
    "reader": "what read the video, pyav or decord, and why that one; empty where no file was read",
    "peak_memory_bytes": "most memory in use: of the GPU's allocator (the fullest GPU of this process), or of the whole "
    "process on a CPU",
    "difference": "of the first differing token: its index; the candidates, what came out and what the target prefers, as ids "
    "and texts; by how much it prefers the latter in a one-row pass (gap) and in a many-row pass (gap_many_rows), and the "
    "drift that rounding causes on average, in logits; ties: how many tokens of the answer are not the one-row choice; for a "
    "tie the control: is the baseline the same when decoded twice? null when there is none",
    "hf_check": "`check=hf` or `generate`: identical, tie at token K (gap G), or MISMATCH at token K: why, by Hugging "
    "Face's own model, loaded anew; lossy; or not checked, and why. null while it is still to come",
    "hf_difference": "the first tokens that are not that model's argmax: index; candidates, what came out and the argmax, as "
    "ids and texts; by how much it prefers the latter (gap), and how much of that rounding explains, in logits; null when "
    "there is none",
    "parallel": "how the target was spread: layers, or tensor; null on one device",
    "devices": "over how many devices the target was spread",
    "weights": "what target and draft are held in: a dtype, or what their text layers and head are quantised to; without draft "
    "where none was loaded",
    "out_of_memory": "what the run did when memory ran out: warming up, decoding, decoding without a drafter, or checking; all "
    "else is then of what was done before. null when it did not",
    "engine": "how the steps of target and draft ran: eager, or graphs (captured on a GPU); without draft where there was none",
    "capture_s": "seconds the engine spent on compiling and capturing, nearly all in the warm-up; in no other time but times_s",
    "strategies": "pruner, drafter and verifier with all their fields",
    "versions": "of specvlm, python, torch, transformers and the machine",
}

SPANS = ("decode", "end_to_end", "file_to_last_token")  # that have a `baseline_…_s` and a `speedup_…`
# Of KEYS what older rows and summaries lack.
LATER = (*(key for key in KEYS if "file_to_" in key), "reader", "hf_check", "hf_difference")
FIRST_TOKEN, DRAFTER_START = ("embed", "prefill"), ("prune", "draft_prefill")


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def times_of(steps: Sequence[Step]) -> dict[str, float]:
    """Seconds by part, added up over the steps."""
    total: dict[str, float] = {}
    for step in steps:
        for part, seconds in step.times_s.items():
            total[part] = total.get(part, 0.0) + seconds
    return total


def speed_of(steps: Sequence[Step]) -> dict[str, float]:
    """time_to_first_token_s, drafter_start_s, decode_s, end_to_end_s, tokens_per_second."""
    return speed(times_of(steps), len(tokens_of(steps)))


def speed(times: Mapping[str, float], tokens: int, video_s: float = 0.0) -> dict[str, float]:
    """The same, of seconds by part and the number of tokens; behind so many seconds for the video, from the file on, too."""
    first, start = (sum(times.get(part, 0.0) for part in parts) for parts in (FIRST_TOKEN, DRAFTER_START))
    whole = sum(times.values()) - times.get("capture", 0.0)
    decode = whole - first - start
    return {
        "time_to_first_token_s": first,
        "drafter_start_s": start,
        "decode_s": decode,
        "end_to_end_s": whole,
        "file_to_first_token_s": video_s + first,
        "file_to_last_token_s": video_s + whole,
        "tokens_per_second": (tokens - 1) / (start + decode) if decode > 0 else 0.0,
    }


def speedups(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """`speedup_…` of every span, None where there is no baseline."""
    return {f"speedup_{span}": ratio_of(figures[f"baseline_{span}_s"], figures[f"{span}_s"]) for span in SPANS}


def acceptance_of(steps: Sequence[Step]) -> dict[str, Any]:
    """rounds, accepted_per_round, tokens_per_round, drafted_per_round, acceptance_by_depth."""
    rounds = steps[1:]
    full = [step for step in rounds if step.full]
    accepted = [step.accepted for step in full]
    mean = sum(accepted) / len(accepted) if accepted else None
    deepest = max((step.depth for step in full), default=0)
    return {
        "rounds": len(rounds),
        "accepted_per_round": mean,
        "tokens_per_round": None if mean is None else mean + 1,
        "drafted_per_round": sum(step.drafted for step in full) / len(full) if full else None,
        "acceptance_by_depth": [sum(a >= depth for a in accepted) / len(accepted) for depth in range(1, deepest + 1)],
    }


def ratio_of(baseline: float | None, ours: float) -> float | None:
    return baseline / ours if baseline and ours > 0 else None


OF_JOB = ("strategies", "versions")  # of KEYS what no row has, since it is the same in all
# What a job's totals have of KEYS as the mean over the samples that have it, and as the last sample has it.
MEANS = ("kept_tokens", "video_tokens", "prompt_tokens", "new_tokens", "rounds", "accepted_per_round", "tokens_per_round",
         "drafted_per_round", "time_to_first_token_s", "drafter_start_s", "decode_s", "end_to_end_s", "tokens_per_second",
         "file_to_first_token_s", "file_to_last_token_s", "baseline_decode_s", "baseline_end_to_end_s",
         "baseline_file_to_first_token_s", "baseline_file_to_last_token_s")  # fmt: skip
LAST = ("parallel", "devices", "weights", "engine")
VERDICTS = ("identical", "numeric tie", "MISMATCH", "sampled", "lossy", "not checked")
HF_CHECKS = ("identical", "tie", "MISMATCH", "lossy", "not checked")

TOTALS = {
    "status": "complete (every sample is ok or skipped), incomplete (some are missing or failed), or failed (the job could not "
    "begin, or not go on, or no sample is ok; see reason)",
    "reason": "why it failed; null when it did not",
    "dataset": "its name; `split` and `version` are the part and the edition of it",
    "samples": "how many the data set has: ok, failed, skipped (no video is there) and missing (not done yet) add up to it",
    "verdicts": "how many samples of each verdict",
    "hf_checks": "how many samples of each hf_check; empty where there was no check",
    "ties": "tokens that are not the choice of a one-row pass (`tied`), of how many (`tokens`), in answers that are identical "
    "or tie; `normal` is the most that rounding explains. null where no answer was compared",
    "reasons": "by sample, why it failed or was skipped",
    "speedup_decode": "baseline_decode_s / decode_s, each summed over the samples that have both; `speedup_end_to_end` and "
    "`speedup_file_to_last_token` alike",
    "acceptance_by_depth": "mean over samples; a depth that a sample's trees do not have counts as 0",
    "times_s": "mean seconds by part, over samples",
    "reader": "what read the video, pyav or decord, and why that one; empty where no file was read",
    "peak_memory_bytes": "most over all samples",
    "capture_s": "sum over samples",
}


def outcome(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """status and reason, of a job that could begin."""
    found = {row["status"] for row in rows}
    if len(rows) < samples:
        return {"status": "incomplete", "reason": None}
    if "ok" not in found:
        why = next((row.get("reason") for row in rows if row["status"] == "failed"), None) or "no video of its samples is there"
        return {"status": "failed", "reason": f"no sample is ok: {why}"}
    return {"status": "incomplete" if "failed" in found else "complete", "reason": None}


def totals(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """What TOTALS explains, of the rows of a job (see `rows.rows_of`) whose data set has so many samples."""
    done = [row for row in rows if row["status"] == "ok"]
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    found: dict[str, Any] = {
        **outcome(rows, samples),
        **{key: rows[0][key] if rows else None for key in ("dataset", "split", "version")},
        "samples": samples,
        **count,
        "missing": samples - len(rows),
        "verdicts": {v: n for v in VERDICTS if (n := sum(row["verdict"].startswith(v) for row in done))},
        "hf_checks": hf_checks(done),
        "ties": ties_of(done),
        "reasons": {row["sample"]: row.get("reason") for row in rows if row["status"] != "ok"},
        **{key: mean([row[key] for row in done if row.get(key) is not None]) for key in MEANS},
    }
    for what in SPANS:
        both = [(row.get(f"baseline_{what}_s"), row.get(f"{what}_s")) for row in done]
        pairs = [(base, ours) for base, ours in both if base is not None and ours is not None]
        found[f"speedup_{what}"] = ratio_of(sum(base for base, _ in pairs), sum(ours for _, ours in pairs))
    depths = [row["acceptance_by_depth"] for row in done if row["accepted_per_round"] is not None]
    deepest = max(map(len, depths), default=0)
    found["acceptance_by_depth"] = [mean([(*shares, *[0.0] * deepest)[at] for shares in depths]) for at in range(deepest)]
    parts = dict.fromkeys(part for row in done for part in row["times_s"])
    found["times_s"] = {part: mean([row["times_s"].get(part, 0.0) for row in done]) for part in parts}
    found["peak_memory_bytes"] = max((row["peak_memory_bytes"] for row in done), default=None)
    found["capture_s"] = sum(row["capture_s"] for row in done)
    return found | {key: done[-1][key] if done else None for key in LAST}


def hf_checks(done: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    told = [row.get("hf_check") or "not checked" for row in done]
    if set(told) <= {"not checked"}:
        return {}
    return {kind: n for kind in HF_CHECKS if (n := sum(text.startswith(kind) for text in told))}


# Most tokens that rounding ties, as a share, by the dtype of the target: five times what the embedded pairs show on footage
# unlike their own (bfloat16 0.6 %, float16 0.06 %, float32 0.03 %); on their own footage they show none. Random weights of
# a 7B model, whose logits lie closer than any trained one's, show 8 %.
NORMAL_TIES = {"float64": 0.0, "float32": 0.0015, "float16": 0.003}
MOST_TIES = 0.03  # in bfloat16, and of quantised weights


def ties_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """What TOTALS explains. normal: the mean, and three standard deviations more."""
    rows = [row for row in rows if (row["verdict"] or "").startswith(("identical", "numeric tie"))]
    if not rows:
        return None
    tokens = sum(row["new_tokens"] for row in rows)
    tied = sum(row["difference"].get("ties", 1) for row in rows if row.get("difference"))  # older rows have no count
    share = NORMAL_TIES.get((rows[-1]["weights"] or {}).get("target", ""), MOST_TIES)
    return {"tied": tied, "tokens": tokens, "normal": math.ceil(share * tokens + 3 * math.sqrt(share * tokens))}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "machine": f"{platform.system()} {platform.machine()}"}
    return found | {package: _version(package) for package in ("specvlm", "torch", "transformers")}


@cache  # a file is parsed for it, twice a row
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
