"""Compute the metrics of summary.json and samples.jsonl. KEYS explains those of a request, TOTALS those of a job."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from specvlm.results import scores

if TYPE_CHECKING:
    from specvlm.types import Step

KEYS = {
    "verdict": "identical, identical (exact by construction), numeric tie at token K (gap G), MISMATCH at token K: why, "
    "sampled, lossy, or not checked (no baseline, or out of memory)",
    "text": "the answer, without special tokens",
    "token_ids": "token ids of the answer, including the stop id",
    "baseline_token_ids": "token ids of the target's own answer, from `autoregressive`; null without a baseline",
    "prompt_tokens": "number of tokens in the prompt",
    "video_tokens": "number of video tokens in the prompt",
    "kept_tokens": "number of video tokens the drafter saw; null if it has no model, chooses them itself or was not started",
    "reused_tokens": "number of prompt tokens that an earlier request had computed; null if nothing is kept (prefixes=false)",
    "reused_s": "seconds that these tokens took when they were computed",
    "new_tokens": "length of token_ids",
    "rounds": "verification passes of the target after the prefill",
    "accepted_per_round": "mean guesses accepted per round, without the bonus token (the paper's tau), over the rounds that no "
    "stop id or token limit cut short; null if there are none",
    "tokens_per_round": "accepted_per_round + 1",
    "drafted_per_round": "mean guesses checked per round, over the same rounds",
    "acceptance_by_depth": "share of the same rounds that accepted at least 1, 2, 3 … guesses, up to the depth of the tree",
    "hit_rate": "share of rounds whose tree was drafted, at least in part, while the one before was checked; null if the "
    "drafter does not draft during checks",
    "time_to_first_token_s": "embed + prefill, seconds",
    "drafter_start_s": "prune + draft_prefill after the first token, not what ran before, seconds; 0 if nothing is drafted",
    "decode_s": "drafting and verification of all rounds, without both prefills, seconds (the paper's measure)",
    "end_to_end_s": "time_to_first_token_s + drafter_start_s + decode_s; reading the video is in times_s.video",
    "file_to_first_token_s": "wall time from opening the file to the first token: times_s.video + time_to_first_token_s; "
    "without loading the models, warm-up and capture",
    "file_to_last_token_s": "wall time from opening the file to the last token: times_s.video + end_to_end_s; "
    "without loading the models, warm-up and capture",
    "tokens_per_second": "tokens after the first, divided by drafter_start_s + decode_s",
    "baseline_decode_s": "decode_s of `autoregressive`",
    "baseline_end_to_end_s": "end_to_end_s of `autoregressive`",
    "baseline_file_to_first_token_s": "file_to_first_token_s of `autoregressive`, with the same times_s.video",
    "baseline_file_to_last_token_s": "file_to_last_token_s of `autoregressive`, with the same times_s.video",
    "speedup_decode": "baseline_decode_s / decode_s",
    "speedup_end_to_end": "baseline_end_to_end_s / end_to_end_s",
    "speedup_file_to_last_token": "baseline_file_to_last_token_s / file_to_last_token_s: over all that the user waits for",
    "times_s": "seconds by part: video (reading and preprocessing; in every row that shares the reading, and in full even "
    "if read ahead), embed, prefill, prune, draft_prefill, draft, verify; capture if the engine met a new tree shape or a new "
    "cache during the request",
    "batch": "most samples decoded at the same time. Above 1, the times and speeds with the drafter are null, since they would "
    "not be those of one request, and times_s has the video alone; those of the baseline are of one request",
    "reader": "the library that read the video, pyav or decord, and why; empty if no file was read",
    "peak_memory_bytes": "peak memory: of the GPU's allocator (the fullest GPU of this process), or of the whole "
    "process on a CPU",
    "difference": "the first differing token: its index; the candidates (ours, then the target's) as ids and texts; in logits, "
    "by how much the target prefers its own in a one-row pass (gap) and in a many-row pass (gap_many_rows), and the mean drift "
    "by rounding; ties: number of tokens of the answer that are not the one-row choice; control, for a tie: whether a second "
    "decode gives the same baseline. null if no token differs",
    "hf_check": "verdict of `check=hf` or `generate`, by Hugging Face's model, loaded separately: identical, tie at token K "
    "(gap G), or MISMATCH at token K: why; lossy; or not checked, and why. null while the check is pending",
    "hf_difference": "the first tokens that are not that model's argmax: index; candidates (ours, then the argmax) as ids and "
    "texts; in logits, by how much it prefers its own (gap) and how much of that rounding explains; null if there are none",
    "parallel": "how the target was split: layers or tensor; null on one device",
    "devices": "number of devices that hold the target",
    "weights": "dtype of target and draft, or the quantisation of their text layers and head; no draft entry if none was "
    "loaded",
    "out_of_memory": "the stage in which memory ran out: warming up, decoding, decoding without a drafter, or checking; all "
    "other keys then cover the work before it. null if memory sufficed",
    "engine": "how target and draft ran: eager, or graphs (captured on a GPU); no draft entry without a draft",
    "capture_s": "seconds the engine spent on compiling and capturing, nearly all in the warm-up; only times_s includes it",
    "strategies": "pruner, drafter and verifier with all their fields",
    "versions": "of specvlm, python, torch, transformers and the machine",
}

SPANS = ("decode", "end_to_end", "file_to_last_token")  # each has a `baseline_…_s` and a `speedup_…`
# KEYS that rows and summaries of older versions may lack.
LATER = (*(key for key in KEYS if "file_to_" in key), "reader", "batch", "hf_check", "hf_difference", "hit_rate",
         "reused_tokens", "reused_s")  # fmt: skip
# KEYS that are null for samples decoded together.
OF_ONE_REQUEST = ("time_to_first_token_s", "drafter_start_s", "tokens_per_second",
                  *(f"{where}_s" for where in (*SPANS, "file_to_first_token")))  # fmt: skip
# Parts of a request's time that make up time_to_first_token_s and drafter_start_s.
FIRST_TOKEN, DRAFTER_START = ("embed", "prefill"), ("prune", "draft_prefill")


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """Join the output tokens of the steps."""
    return [token for step in steps for token in step.tokens]


def times_of(steps: Sequence[Step]) -> dict[str, float]:
    """Seconds by part, summed over the steps."""
    total: dict[str, float] = {}
    for step in steps:
        for part, seconds in step.times_s.items():
            total[part] = total.get(part, 0.0) + seconds
    return total


def speed_of(steps: Sequence[Step]) -> dict[str, float]:
    """Compute the times and the speed of a request, leaving out the time to read the video; see `speed`."""
    return speed(times_of(steps), len(tokens_of(steps)))


def speed(times: Mapping[str, float], tokens: int, video_s: float = 0.0) -> dict[str, float]:
    """Compute the times and the speed that KEYS explains.

    Args:
        times: Seconds by part, as in `Step.times_s`, over all steps.
        tokens: Number of output tokens.
        video_s: Seconds spent on reading the video.
    """
    first, start = (sum(times.get(part, 0.0) for part in parts) for parts in (FIRST_TOKEN, DRAFTER_START))
    whole = sum(times.values()) - times.get("capture", 0.0)
    decode = max(0.0, whole - first - start)  # a difference of sums may be a rounding error below 0
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
    """Compute `speedup_…` for each of SPANS, None without a baseline. `figures` has `…_s` and `baseline_…_s`."""
    return {f"speedup_{span}": ratio_of(figures[f"baseline_{span}_s"], figures[f"{span}_s"] or 0.0) for span in SPANS}


def reused(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Compute `reused` of a job; TOTALS explains it."""
    kept = [row for row in done if row.get("reused_tokens") is not None]
    if not kept:
        return None
    sums = {name: sum(row[key] or 0 for row in kept) for name, key in (("tokens", "reused_tokens"), ("seconds", "reused_s"))}
    return {"samples": sum(row["reused_tokens"] > 0 for row in kept), **sums}


def reuse_of(steps: Sequence[Step]) -> dict[str, Any]:
    """Return how much of the prompt earlier requests had computed, and how long that took them (see `KEYS`)."""
    found = next((step.reused for step in steps if step.reused is not None), None)
    return {"reused_tokens": None if found is None else found.tokens, "reused_s": None if found is None else found.seconds}


def acceptance_of(steps: Sequence[Step]) -> dict[str, Any]:
    """Compute rounds, the keys about what a round accepts, and hit_rate (see KEYS)."""
    rounds = steps[1:]
    full = [step for step in rounds if step.full]
    accepted = [step.accepted for step in full]
    mean = sum(accepted) / len(accepted) if accepted else None
    deepest = max((step.depth for step in full), default=0)
    ahead = [step.ahead > 0 for step in rounds if step.ahead is not None]
    return {
        "rounds": len(rounds),
        "accepted_per_round": mean,
        "tokens_per_round": None if mean is None else mean + 1,
        "drafted_per_round": sum(step.drafted for step in full) / len(full) if full else None,
        "acceptance_by_depth": [sum(a >= depth for a in accepted) / len(accepted) for depth in range(1, deepest + 1)],
        "hit_rate": sum(ahead) / len(ahead) if ahead else None,
    }


def ratio_of(baseline: float | None, ours: float) -> float | None:
    """Divide the baseline's time by ours. None without a baseline, or if a time is 0."""
    return baseline / ours if baseline and ours > 0 else None


OF_JOB = ("strategies", "versions")  # KEYS that rows leave out, since all rows of a job have the same values
# A job's totals have the mean over the samples of the KEYS in MEANS, and the last sample's value of those in LAST.
MEANS = ("kept_tokens", "video_tokens", "prompt_tokens", "new_tokens", "rounds", "accepted_per_round", "tokens_per_round",
         "drafted_per_round", "hit_rate", "time_to_first_token_s", "drafter_start_s", "decode_s", "end_to_end_s",
         "tokens_per_second",
         "file_to_first_token_s", "file_to_last_token_s", "baseline_decode_s", "baseline_end_to_end_s",
         "baseline_file_to_first_token_s", "baseline_file_to_last_token_s", "reused_tokens", "reused_s")  # fmt: skip
LAST = ("parallel", "devices", "weights", "engine", "batch")
VERDICTS = ("identical", "numeric tie", "MISMATCH", "sampled", "lossy", "not checked")
HF_CHECKS = ("identical", "tie", "MISMATCH", "lossy", "not checked")

TOTALS = {
    "status": "complete (every sample is ok or skipped), incomplete (some are missing or failed), or failed (the job could not "
    "start or go on, or no sample is ok; see reason)",
    "reason": "why the job failed; null if it did not",
    "dataset": "name of the data set; `split` and `version` say which part and edition",
    "samples": "number of samples in the data set: ok + failed + skipped (its video is missing) + missing (not done yet)",
    "verdicts": "number of samples by verdict",
    "hf_checks": "number of samples by hf_check; empty without a check",
    "ties": "number of tokens that are not the choice of a one-row pass (`tied`), out of `tokens`, over answers that are "
    "identical or tie; `normal` is the most that rounding explains. null if no answer was compared",
    "scores": "scores of the answers by metric, see below; empty if nothing was scored",
    "lossy": "number of answers by a lossy rule that differ from the target's own (`differ`), out of `compared`; null if no "
    "answer is lossy, or there are no baselines",
    "metrics": "the metrics of `scores` with all their fields, and where the rules come from",
    "reasons": "why a sample failed or was skipped, by sample",
    "speedup_decode": "baseline_decode_s / decode_s, each summed over the samples that have both; `speedup_end_to_end` and "
    "`speedup_file_to_last_token` likewise",
    "acceptance_by_depth": "mean over samples; a depth that a sample's trees do not reach counts as 0",
    "times_s": "mean seconds by part, over samples",
    "reader": "the library that read the video, pyav or decord, and why; empty if no file was read",
    "peak_memory_bytes": "maximum over samples",
    "capture_s": "sum over samples",
    "reused": "samples whose prompt began like an earlier one (`samples`), and how many prompt `tokens` and `seconds` of "
    "prefill that saved; null if nothing was kept",
}


def outcome(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """Return status and reason of a job that started; TOTALS explains them."""
    found = {row["status"] for row in rows}
    if len(rows) < samples:
        return {"status": "incomplete", "reason": None}
    if "ok" not in found:
        why = next((row.get("reason") for row in rows if row["status"] == "failed"), None) or "all its videos are missing"
        return {"status": "failed", "reason": f"no sample is ok: {why}"}
    return {"status": "incomplete" if "failed" in found else "complete", "reason": None}


def totals(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """Compute the totals of a job; TOTALS explains them.

    Args:
        rows: Rows of the job, see `rows.rows_of`.
        samples: Number of samples in its data set.
    """
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
        "scores": scores.totals_of(done),
        "lossy": scores.differing(done),
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
    found["reused"] = reused(done)
    return found | {key: done[-1].get(key) if done else None for key in LAST}


def hf_checks(done: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the rows by hf_check; empty if nothing was checked."""
    told = [row.get("hf_check") or "not checked" for row in done]
    if set(told) <= {"not checked"}:
        return {}
    return {kind: n for kind in HF_CHECKS if (n := sum(text.startswith(kind) for text in told))}


# Largest share of tied tokens that rounding explains, by dtype of the target. It is five times the share that the
# embedded pairs show on footage they were not trained on (bfloat16 0.6 %, float16 0.06 %, float32 0.03 %); on their own
# footage they show none. A 7B model with random weights shows 8 %: its logits are closer together than those of any
# trained model.
NORMAL_TIES = {"float64": 0.0, "float32": 0.0015, "float16": 0.003}
MOST_TIES = 0.03  # for bfloat16 and quantised weights


def ties_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Compute `ties` as TOTALS explains it. `normal`: what NORMAL_TIES expects, plus three standard deviations."""
    rows = [row for row in rows if (row["verdict"] or "").startswith(("identical", "numeric tie"))]
    if not rows:
        return None
    tokens = sum(row["new_tokens"] for row in rows)
    tied = sum(row["difference"].get("ties", 1) for row in rows if row.get("difference"))  # older rows have no count
    share = NORMAL_TIES.get((rows[-1]["weights"] or {}).get("target", ""), MOST_TIES)
    return {"tied": tied, "tokens": tokens, "normal": math.ceil(share * tokens + 3 * math.sqrt(share * tokens))}


def mean(values: Sequence[float]) -> float | None:
    """Mean of the values; None if there are none."""
    return sum(values) / len(values) if values else None


def versions() -> dict[str, str]:
    """Versions of Python, specvlm, torch and transformers, and the kind of machine."""
    found = {"python": sys.version.split()[0], "machine": f"{platform.system()} {platform.machine()}"}
    return found | {package: _version(package) for package in ("specvlm", "torch", "transformers")}


@cache  # a look-up parses a file, and each row would need it twice
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
