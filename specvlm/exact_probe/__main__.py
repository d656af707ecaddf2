"""`python -m specvlm.exact_probe`: count results that depend on a pass's rows.

Plain decoding runs one row per pass, a check of guesses runs many. If a row's
logits depend on how many rows share the pass, speculation may choose other
tokens. The target answers a question about a video. The same tokens are then
run again, in passes of one row and of several, in three ways: by specvlm's
engine, and by Hugging Face's modules with SDPA and eager attention. The table
shows the shares of positions (tokens of the answer) whose logits differ in any
bit from those of a pass of one row, and whose best token differs.

Takes the overrides of a run, such as target.path=… video=… engine=graphs.
max_new_tokens is the number of positions, 128 by default; dtype is bfloat16
by default. Exit code 1: the engine claims to be exact, and it is not. The other
exit codes are those of a run.
"""

if __name__ == "__main__":
    from specvlm.app.terminal import loading

    loading()

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from specvlm.app import compose
from specvlm.app.cli import run_command
from specvlm.app.console import RunConsole
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.placement import places_of
from specvlm.app.prepare import own_sample, read, set_up
from specvlm.app.quoting import quoted
from specvlm.app.request import threads
from specvlm.config import RunConfig
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.engine import Engine
from specvlm.errors import ExitCode, UserError
from specvlm.models.attention import IMPLEMENTATIONS
from specvlm.models.fused import HUGGING_FACE
from specvlm.models.kv_cache import KVCache
from specvlm.models.video_lm import VideoLM
from specvlm.parallel import torchrun
from specvlm.results.folder import write_json
from specvlm.results.metrics import tokens_of
from specvlm.strategies.verifiers.greedy import GreedyVerifier
from specvlm.types import VideoPrompt

ROWS = (2, 6, 16, 26, 64)  # numbers of rows of a pass; 26 is that of the paper's tree
DEFAULTS = {"dtype": "bfloat16", "max_new_tokens": "128", "drafter": "prompt_lookup"}
Append = Callable[[Tensor, KVCache], Tensor]  # runs (Q,) tokens after the cached ones; returns (Q, V) logits


@dataclass(frozen=True)
class Counts:
    """Number of positions whose logits, or best token, differ from those of a pass of one row.

    Attributes:
        arithmetic: "specvlm", "sdpa" or "eager".
        rows: Number of rows of each pass.
        positions: Number of positions compared.
        bits: Number of positions where any logit differs.
        best: Number of positions whose best token differs.
    """

    arithmetic: str
    rows: int
    positions: int
    bits: int
    best: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(argv, lambda: print((__doc__ or "").strip()), command)


def command(words: Sequence[str]) -> int:
    """Read the overrides, measure, print, and write exact_probe.json into the run's folder; returns the exit code.

    Raises:
        UserError: An override is not understood, or asks for a data set or several ranks.
    """
    if options := [word for word in words if word.startswith("-")]:
        raise UserError(f"{options[0]}: the probe has no options but --help")
    given = {word.partition("=")[0].lstrip("+") for word in words}
    words = [*(f"{key}={value}" for key, value in DEFAULTS.items() if key not in given), *words]
    run = compose.jobs(quoted(words, sweep=False), sweep=False)[0]
    if run.cfg.dataset is not None:
        raise UserError("the probe asks one question about one video: give video=FILE question=… instead of dataset=…")
    if run.cfg.target.parallel is not None or torchrun.size_here() > 1:
        raise UserError("the probe runs in one process, on one device: leave out torchrun and target.parallel")
    with threads(run.cfg.threads):
        exact, counts, about = probe(run.cfg)
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run.run_dir / "exact_probe.json", about | {"counts": [asdict(one) for one in counts]})
    wrong = exact and any(one.bits for one in counts if one.arithmetic == "specvlm")
    return ExitCode.MISMATCH if wrong else ExitCode.OK


@torch.inference_mode()
def probe(cfg: RunConfig) -> tuple[bool, list[Counts], dict[str, object]]:
    """Load the target, count differences in all arithmetics, and print a table.

    Returns:
        Whether the engine claims to be exact, the counts, and facts about the run: target, dtype, device, engine,
        numbers of tokens.
    """
    screen = RunConsole()
    setup = set_up(cfg, places_of(cfg))
    job = MODEL_CACHE.plan(setup, read(setup, own_sample(cfg)))
    graph = MODEL_CACHE.graph(job)
    target, engine = graph.target, graph.engine
    screen.note(engine.note)
    counts, answer = list[Counts](), answer_of(graph, job.prompt, cfg.max_new_tokens)
    widths = [rows for rows in ROWS if rows <= len(answer)]
    with screen.progress("passes", 3 * (1 + len(widths))) as advance:
        for name, append in arithmetics(target, engine):
            counts += differences(name, append, target, job.prompt, answer, widths, advance)
    exact = engine.exact(target)
    place = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "CPU"
    about = {
        "target": str(cfg.target.path), "dtype": str(target.dtype).removeprefix("torch."), "device": place,
        "engine": engine.runs(target), "exact": exact, "prompt_tokens": len(job.prompt), "positions": len(answer),
    }  # fmt: skip
    show(screen, counts, about)
    return exact, counts, about


def answer_of(graph: DecodingGraph, prompt: VideoPrompt, limit: int) -> list[int]:
    """Decode `limit` tokens with the target alone, past its stop ids, so that there are enough positions."""
    options = replace(graph.options, max_new_tokens=limit, stop_ids=frozenset())
    return tokens_of(list(autoregressive(graph.target, prompt, options, GreedyVerifier(), graph.caches, graph.engine)))


def arithmetics(target: VideoLM, engine: Engine) -> Iterator[tuple[str, Append]]:
    """Yield the name of each arithmetic, and a function that runs tokens in it, valid until the next one is yielded."""
    yield "specvlm", lambda tokens_Q, cache: engine.append(target, tokens_Q, cache)
    for attention in ("sdpa", "eager"):
        with attention_of(target, attention):
            yield attention, partial(appended, target, attention == "eager")


def appended(target: VideoLM, additive: bool, tokens_Q: Tensor, cache: KVCache) -> Tensor:
    """Append tokens to a cache through Hugging Face's modules; returns (Q, V) logits.

    The mask is explicit: without one, SDPA treats the first row as the first of the whole sequence.

    additive: Use a mask that is added to the scores, as eager attention needs, instead of a boolean mask.
    """
    base, rows = cache.length, len(tokens_Q)
    mask_QK = torch.ones(rows, base + rows, dtype=torch.bool).tril(base)
    if additive:
        mask_QK = torch.zeros(mask_QK.shape, dtype=target.dtype).masked_fill(~mask_QK, torch.finfo(target.dtype).min)
    positions_AQ = (torch.arange(rows) + base + cache.offset).expand(target.axes, -1)
    return target.head(target.forward(target.embed_tokens(tokens_Q), positions_AQ, cache, mask_QK))


@contextmanager
def attention_of(target: VideoLM, attention: str) -> Iterator[None]:
    """Run the text layers by Hugging Face's own code within the context, with one of its attention functions."""
    forms, target.forms = target.forms, HUGGING_FACE  # fused forms call specvlm's attention, whatever is set
    target.hf.set_attn_implementation({"text_config": attention})
    try:
        yield
    finally:
        target.hf.set_attn_implementation(IMPLEMENTATIONS)
        target.forms = forms


def differences(
    name: str,
    append: Append,
    target: VideoLM,
    prompt: VideoPrompt,
    answer: Sequence[int],
    widths: Sequence[int],
    advance: Callable[[], None],
) -> list[Counts]:
    """Run the answer with one row per pass, then again with each number of rows in `widths`, and count differences.

    The prompt is prefilled once. Tokens at the end that do not fill a pass are left out.

    advance: Called after each walk over the answer.
    """
    cache, tokens_T, start = target.new_cache(len(prompt) + len(answer)), torch.tensor(answer), len(prompt)
    target.prefill(target.embed(prompt, target.features(prompt)), target.positions(prompt), cache, prompt.cut)
    alone = [append(tokens_T[at : at + 1], cache)[0].cpu() for at in range(len(answer))]
    advance()
    found = []
    for rows in widths:
        cache.length, positions, bits, best = start, 0, 0, 0
        for at in range(0, len(answer) - rows + 1, rows):
            for row_V, own_V in zip(append(tokens_T[at : at + rows], cache).cpu(), alone[at:], strict=False):
                positions += 1
                bits += not torch.equal(row_V, own_V)
                best += bool(row_V.argmax() != own_V.argmax())
        found.append(Counts(name, rows, positions, bits, best))
        advance()
    return found


def show(screen: RunConsole, counts: Sequence[Counts], about: dict[str, object]) -> None:
    """Print the shares of differing positions by rows of a pass and arithmetic, and what the engine claims."""
    names = list(dict.fromkeys(one.arithmetic for one in counts))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rows", justify="right")
    for name in names:
        table.add_column(f"{name}: logits", justify="right")
        table.add_column("token", justify="right")
    for rows in dict.fromkeys(one.rows for one in counts):
        by_name = {one.arithmetic: one for one in counts if one.rows == rows}
        cells = [f"{n / by_name[name].positions:.1%}" for name in names for n in (by_name[name].bits, by_name[name].best)]
        table.add_row(str(rows), *cells)
    say = screen.console.print
    say("{target}, {dtype} on {device}: {positions} positions after {prompt_tokens} tokens".format(**about))
    say("share of positions whose logits, and whose best token, differ from those of a pass of one row:")
    say(table)
    claim = "exact by construction" if about["exact"] else "not exact by construction here"
    say(f"specvlm runs engine={about['engine']}, which is {claim}")


if __name__ == "__main__":
    sys.exit(main())
