"""Schemas, with bounds, of data read back from the files that runs write. Other keys of these files are ignored."""

from typing import Annotated, Any, Literal, NotRequired, Required

from annotated_types import MaxLen
from typing_extensions import TypedDict

from specvlm.parsing.bounds import Count, Seconds, Within
from specvlm.types import MOST_GUESSES

Token = Annotated[int, Within(0, 2**31 - 1)]
Tokens = Annotated[int, Within(0, 10_000_000)]  # a number of tokens
Rank = Annotated[int, Within(0, MOST_GUESSES)]  # of a guess among its siblings, from 0; or a number of siblings
Share = Annotated[float, Within(0, 1)]
Real = Annotated[float, Within(0, 1e30)]
MOST_SCORE = 1e30  # maximum absolute value, so that sums of scores stay finite
Score = Annotated[float, Within(-MOST_SCORE, MOST_SCORE)] | None


class Named(TypedDict):
    """A strategy or data set in config.yaml, of which only the name is read."""

    name: str


class Side(TypedDict):
    """Target or draft in config.yaml."""

    path: str


class Ran(TypedDict):
    """The keys of config.yaml that a report reads."""

    pruner: Named
    drafter: Named
    verifier: Named
    dataset: Named | None
    target: Side
    ratio: Share
    mrope: str
    video: str | list[str]
    question: str | None
    frames: Annotated[int | None, Within(1, 2**31 - 1)]
    fps: Annotated[float | None, Within(0, 1e6, above=True)]
    max_pixels: Annotated[int | None, Within(1, 2**31 - 1)]
    reader: str


class KeptBaseline(TypedDict):
    """A file of `baselines/`.

    Attributes:
        tokens: The target's own answer.
        times_s: Seconds by part.
        key: Name of the file, without the suffix: a hash of `made_of`.
        made_of: Everything that the answer and its times depend on (`baselines.inputs`).
        digest: SHA-256 of the other fields.
    """

    tokens: list[Token]
    times_s: dict[str, Seconds]
    key: str
    made_of: dict[str, Any]
    digest: str


class Figures(TypedDict):
    """Metrics of one answer; `metrics.KEYS` explains them."""

    verdict: str
    text: str
    token_ids: list[Token]
    baseline_token_ids: list[Token] | None
    prompt_tokens: Tokens
    video_tokens: Tokens
    kept_tokens: Tokens | None
    reused_tokens: NotRequired[Tokens | None]
    reused_s: NotRequired[Seconds | None]
    new_tokens: Tokens
    rounds: Tokens
    accepted_per_round: Real | None
    tokens_per_round: Real | None
    drafted_per_round: Real | None
    acceptance_by_depth: Annotated[list[Share], MaxLen(MOST_GUESSES)]
    hit_rate: NotRequired[Share | None]
    time_to_first_token_s: Seconds | None
    drafter_start_s: Seconds | None
    decode_s: Seconds | None
    end_to_end_s: Seconds | None
    file_to_first_token_s: NotRequired[Seconds | None]
    file_to_last_token_s: NotRequired[Seconds | None]
    tokens_per_second: Real | None
    baseline_decode_s: Seconds | None
    baseline_end_to_end_s: Seconds | None
    baseline_file_to_first_token_s: NotRequired[Seconds | None]
    baseline_file_to_last_token_s: NotRequired[Seconds | None]
    speedup_decode: Real | None
    speedup_end_to_end: Real | None
    speedup_file_to_last_token: NotRequired[Real | None]
    times_s: dict[str, Seconds]
    batch: NotRequired[Tokens | None]
    reader: NotRequired[str | None]
    difference: NotRequired[dict[str, Any] | None]
    hf_check: NotRequired[str | None]
    hf_difference: NotRequired[list[dict[str, Any]] | None]
    peak_memory_bytes: Count | None
    parallel: str | None
    devices: Count | None
    weights: dict[str, str] | None
    out_of_memory: str | None
    engine: dict[str, str] | None
    capture_s: Annotated[float, Within(-1, 1e9)]


class Summary(TypedDict, total=False):
    """Keys that any summary.json may have, that of a run or of a job."""

    status: str
    reason: str | None
    dataset: str | None
    versions: dict[str, str] | None


class ScoreTotal(TypedDict):
    """Totals of a metric in summary.json: the keys that are read; `scores.SCORES` explains them."""

    mean: Score
    scored: Count
    baseline: Score


class Totals(Summary, total=False):
    """summary.json of a job over samples; `metrics.TOTALS` explains it."""

    samples: Required[Count]
    ok: Required[Count]
    failed: Required[Count]
    skipped: Required[Count]
    missing: Required[Count]
    verdicts: Required[dict[str, Count]]
    hf_checks: dict[str, Count]
    scores: dict[str, ScoreTotal]
    lossy: dict[str, Count] | None
    reasons: dict[str, str]
    kept_tokens: Required[Real | None]
    accepted_per_round: Required[Real | None]
    speedup_decode: Required[Real | None]
    speedup_end_to_end: Required[Real | None]


class Row(TypedDict):
    """A line of samples.jsonl. If the sample is ok, the line is also an `Answered`."""

    sample: str
    index: Count
    dataset: str
    split: str
    version: str
    status: Literal["ok", "failed", "skipped"]
    reason: NotRequired[str | None]
    question: NotRequired[str | None]
    kept: NotRequired[list[Tokens] | None]
    grids: NotRequired[list[list[Tokens]] | None]
    meta: NotRequired[dict[str, Any] | None]
    scores: NotRequired[dict[str, Score] | None]
    baseline_scores: NotRequired[dict[str, Score] | None]


class Answered(Row, Figures):
    """A line of samples.jsonl whose sample is ok: a `Row` with the metrics of its answer."""


class Round(TypedDict):
    """A line of steps.jsonl, which is one round: the keys that a report reads."""

    tokens: Annotated[list[Token], MaxLen(MOST_GUESSES + 1)]
    accepted: Count
    sample: NotRequired[str]
    kept: NotRequired[list[Tokens]]
    refused: NotRequired[list[Token]]


class Ranked(TypedDict):
    """A line of steps.jsonl with the rank of each accepted guess among its siblings: the keys that `fit_tree` reads."""

    ranks: Annotated[list[Rank], MaxLen(MOST_GUESSES)]
    widths: Annotated[list[Rank], MaxLen(MOST_GUESSES + 1)]  # guesses tried below the root and each accepted guess
