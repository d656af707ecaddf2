"""Check an answer with Hugging Face's own model, which shares only its inputs (token ids, pixels) with our decoding.

The verdict of a run compares two of our loops over one target. It cannot detect a fault that both share: in
positions, attention, features, prompt embedding or stop ids. So this check loads the checkpoint again with
transformers' own class and attention; features, merging, rotary positions, masks, penalty and stop ids are Hugging
Face's.

Shape suffixes: S tokens of a pass, T output tokens, V vocabulary.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specvlm.app.prepare import Prepared, Setup, own_sample, read
from specvlm.app.request import hf_check_of, threads
from specvlm.config import model_folder
from specvlm.decoding.lossless import alike
from specvlm.errors import ExitCode, JobFailed, OutOfMemory, UserError, explained, line, one_line
from specvlm.models import memory_plan
from specvlm.models.checkpoint import SAFELY, folder_of
from specvlm.models.load import family_of, last_logits
from specvlm.results.rows import UNCHECKED, rows_of
from specvlm.strategies.fence import inside
from specvlm.types import VideoPrompt

if TYPE_CHECKING:
    from specvlm.app.job import Job
    from specvlm.app.model_cache import ModelCache
    from specvlm.app.readings import Readings

ATTENTION = "sdpa"  # "eager" would hold the full attention matrix of a prompt
ROUNDINGS = 5  # tolerated gap, in multiples of the typical change that one more rounding per layer makes
MOST = 20  # most differences that are reported


@dataclass(frozen=True)
class Difference:
    """A token of the answer that is not the argmax of Hugging Face's model.

    Attributes:
        token: Index in the answer.
        candidates: Ids of the answer's token and of the argmax.
        gap: Logit of the argmax minus that of the answer's token, after the repetition penalty.
        rounding: The largest gap, in logits, that rounding explains.
    """

    token: int
    candidates: tuple[int, int]
    gap: float
    rounding: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains the gap."""
        return self.gap <= self.rounding


@dataclass(frozen=True)
class Agreement:
    """Result of a check. Its `str` is the verdict.

    Attributes:
        differences: Tokens that are not the argmax, in order.
        fault: (token index, reason) of a fault that rounding cannot explain, such as an end in the wrong place.
    """

    differences: tuple[Difference, ...] = ()
    fault: tuple[int, str] | None = None

    def __str__(self) -> str:
        faults = [(wrong.token, self._describe(wrong)) for wrong in self.differences if not wrong.explained]
        if first := min([*faults, *([self.fault] if self.fault else [])], default=None):
            return f"MISMATCH at token {first[0]}: {first[1]}"
        if self.differences:
            first_tie, more = self.differences[0], len(self.differences) - 1
            return f"tie at token {first_tie.token} (gap {first_tie.gap:.2g})" + (f", and {more} more" if more else "")
        return "identical"

    def _describe(self, wrong: Difference) -> str:
        """Describe a difference that rounding does not explain."""
        others = len(self.differences) - 1
        said = f"Hugging Face's model prefers another token by {wrong.gap:.2g}, rounding explains {wrong.rounding:.2g}"
        return said + (f" ({others} more tokens differ)" if others else "")


class ReferenceModel:
    """A checkpoint loaded by transformers, unmodified: safetensors only, no remote code.

    Keeps stop ids and penalty of the generation config and drops the other settings, as our loops do. Without a device,
    accelerate spreads the layers over all GPUs. Raises UserError if the checkpoint cannot be loaded.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> None:
        from transformers import AutoModelForImageTextToText, GenerationConfig

        spread = {"device_map": "auto"} if device is None else {}
        with explained(f"{folder}: Hugging Face's own model cannot be loaded"):
            asked = {"dtype": dtype, "attn_implementation": ATTENTION} | spread
            hf: Any = AutoModelForImageTextToText.from_pretrained(folder, **asked, **SAFELY)
        self.hf = (hf if spread else hf.to(device)).eval()
        self.family = family_of(folder, hf.config)  # only for its `slots` and `hf_inputs`
        stops = hf.generation_config.eos_token_id
        self.penalty = float(hf.generation_config.repetition_penalty or 1)
        self.hf.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=0)
        self.stop_ids = frozenset(stops if isinstance(stops, list) else [] if stops is None else [stops])

    @classmethod
    def of(cls, setup: Setup) -> ReferenceModel:
        """Load the setup's target. Raises UserError if it cannot be loaded, OutOfMemory if memory runs out."""
        places = setup.places
        with room(setup):
            folder = folder_of(model_folder(setup.cfg.target.path), weights=True)
            return cls(folder, setup.dtype, None if places.parallel == "layers" else places.first)

    @torch.inference_mode()
    def check(
        self, prompt: VideoPrompt, output: Sequence[int], limit: int, penalty: float | None = None, generate: bool = False
    ) -> Agreement:
        """Check that each token is the model's argmax given those before it, and that the output ends where it should.

        Costs one pass over prompt and output, and one more if a token differs. With `generate`, costs one pass per
        token, and two more if a token differs.

        Args:
            prompt: Only its token ids and the vision inputs of its videos and images are read.
            output: Token ids, including the stop id.
            limit: Maximum number of new tokens that was requested.
            penalty: Repetition penalty; None: that of the checkpoint's generation config.
            generate: Compare with the output of Hugging Face's `generate`, which uses its own cache.

        Raises:
            UserError: The output, before its last token, has a placeholder token of a video or image.
        """
        penalty, fault = self.penalty if penalty is None else float(penalty), self._end(output, limit)
        if not generate:
            return Agreement(self._differences(prompt, output, penalty), fault)
        answer = self.generate(prompt, limit, penalty)
        if answer == list(output):
            return Agreement(fault=fault)
        # After the first difference the two answers diverge, so a pass over `output` judges the rest.
        common = alike(answer, output)
        told = f"{len(output)} tokens came out, Hugging Face's generate gives {len(answer)}"
        found = self._differences(prompt, output, penalty, answer[: common + 1])
        return Agreement(found, fault or (None if found else (common, told)))

    def _differences(
        self, prompt: VideoPrompt, output: Sequence[int], penalty: float, known: Sequence[int] = ()
    ) -> tuple[Difference, ...]:
        """Compare the output with the argmaxes of a pass over it. known: argmaxes of the first tokens, if known."""
        config, ulp = self.hf.config, torch.finfo(self.hf.dtype).eps  # rounding of two logits, relative to the larger
        if {*self.family.slots(config)} & set(output[:-1]):
            raise UserError("the answer contains a video placeholder token, which a pass over it cannot read")
        logits_TV, found = self._logits(prompt, output), []
        for at, scores_V in enumerate(self._scores(logits_TV, prompt, output, penalty)):
            best, ours = known[at] if at < len(known) else int(scores_V.argmax()), output[at]
            if best != ours:
                its, own = float(scores_V[best]), float(scores_V[ours])
                found.append(Difference(at, (ours, best), abs(its - own), ulp * max(abs(its), abs(own))))
        if found:
            # How far rounding moves a difference of two logits: the median over tokens, not the worst one.
            pairs = zip(logits_TV.double(), self._logits(prompt, output, perturbed=True).double(), strict=True)
            typical = math.sqrt(2) * median(float((a - b).std()) for a, b in pairs)
            found = [replace(wrong, rounding=wrong.rounding + ROUNDINGS * typical) for wrong in found]
        return tuple(found)

    def generate(self, prompt: VideoPrompt, limit: int, penalty: float = 1.0) -> list[int]:
        """Decode greedily with Hugging Face's `generate`. Returns token ids, including the stop id."""
        out = self.hf.generate(**self._inputs(prompt), max_new_tokens=limit, repetition_penalty=penalty)
        return out[0, len(prompt) :].tolist()

    def _end(self, output: Sequence[int], limit: int) -> tuple[int, str] | None:
        """Check that the output ends at its first stop token, or at the limit. Returns a fault or None."""
        stopped = next((at for at, token in enumerate(output) if token in self.stop_ids), None)
        if stopped is not None and stopped + 1 < len(output):
            return stopped + 1, f"the answer continues after stop token {output[stopped]}"
        if stopped is None and len(output) != limit:
            said = f"the answer ends at {len(output)} tokens, without a stop token, and {limit} were asked for"
            return len(output), said
        return None

    def _inputs(self, prompt: VideoPrompt, more: Sequence[int] = ()) -> dict[str, Tensor]:
        """Build inputs as Hugging Face's processors do. more: token ids after the prompt."""
        tokens_S = torch.cat([prompt.tokens, torch.tensor(more, dtype=prompt.tokens.dtype)])
        made = self.family.hf_inputs(self.hf.config, replace(prompt, tokens=tokens_S))
        device = self.hf.get_input_embeddings().weight.device
        return {name: x.to(device, self.hf.dtype if name.startswith("pixel") else x.dtype) for name, x in made.items()}

    def _logits(self, prompt: VideoPrompt, output: Sequence[int], perturbed: bool = False) -> Tensor:
        """Logits (T, V) before each token of the output, from one pass. perturbed: see `perturbation`.

        Takes the last rows of the result, since some models compute the logits of the whole prompt in any case.
        """
        inputs = self._inputs(prompt, output[:-1]) | last_logits(self.hf, len(output))
        with perturbation(self.hf) if perturbed else nullcontext():
            return self.hf(**inputs, use_cache=False).logits[0, -len(output) :]

    def _scores(self, logits_TV: Tensor, prompt: VideoPrompt, output: Sequence[int], penalty: float) -> Iterator[Tensor]:
        """Yield scores (V,) per token, after transformers' own processor for the repetition penalty."""
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [])
        ids_1S = torch.cat([prompt.tokens, torch.tensor(output, dtype=prompt.tokens.dtype)])[None].to(logits_TV.device)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)  # scores of `generate` are float32
        for at, logits_V in enumerate(logits_TV):
            yield processors(ids_1S[:, : len(prompt) + at], logits_V[None].to(wide))[0]


@contextmanager
def perturbation(hf: Any) -> Iterator[None]:
    """Perturb each layer's output, of text and vision, as a different order of summation might.

    Changes each value by a random share of up to half the dtype's eps; up to eps in 32 and 64 bits, where sums are not
    accumulated in a wider type. Seeded, so that verdicts are reproducible.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    generators: dict[torch.device, torch.Generator] = {}

    def perturb(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        generator = generators.setdefault(hidden.device, torch.Generator(hidden.device).manual_seed(0))
        noise = 2 * torch.rand(hidden.shape, generator=generator, dtype=hidden.dtype, device=hidden.device) - 1
        moved = hidden + hidden * noise * (torch.finfo(hidden.dtype).eps / (2 if hidden.itemsize == 2 else 1))
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    layers = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_hook(perturb) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def room(setup: Setup) -> Iterator[None]:
    """Turn an error of torch into OutOfMemory if it means that memory ran out."""
    try:
        yield
    except RuntimeError as error:
        if not memory_plan.ran_out(error):
            raise
        where = " or ".join(map(str, setup.places.target))
        raise OutOfMemory(
            f"{where} ran out of memory in check={setup.cfg.check}, whose model takes the whole prompt in one pass: "
            "take fewer frames (frames=…), another device, or leave check out"
        ) from error


def result_keys(found: Agreement, tokenizer: Any) -> dict[str, Any]:
    """Format a result as hf_check and hf_difference (see `metrics.KEYS`), at most MOST differences."""
    wrong = [
        asdict(part) | {"candidate_texts": [tokenizer.decode([token]) for token in part.candidates]}
        for part in found.differences[:MOST]
    ]
    return {"hf_check": str(found), "hf_difference": wrong or None}


def check_run(held: ModelCache, request: Prepared, token_ids: Sequence[int]) -> dict[str, Any]:
    """Check the answer of a run. Returns hf_check and hf_difference.

    Drops the loaded models first, to free memory. Reads the video again, since plugins have had access to the prompt.
    """
    held.clear()
    model, cfg = ReferenceModel.of(request), request.cfg
    prompt = read(request, own_sample(cfg)).prompt
    with room(request):
        found = model.check(prompt, token_ids, cfg.max_new_tokens, cfg.repetition_penalty, cfg.check == "generate")
    return result_keys(found, request.target.tokenizer)


def unchecked(job: Job) -> list[tuple[int, dict[str, Any]]]:
    """List (sample index, row) of this process's rows that have yet to be checked."""
    with inside(job.setup.verifier):
        graph = job.setup.graph()
    if job.folder is None or hf_check_of(job.cfg, graph) is not None:
        return []
    rows = {row["sample"]: row for row in rows_of(job.folder) if row["status"] == "ok" and row.get("hf_check") in UNCHECKED}
    return [(index, rows[job.samples[index].id]) for index in job.shard_indices if job.samples[index].id in rows]


def check_rows(jobs: Sequence[Job], readings: Readings, tell: Callable[[Exception], int]) -> list[int]:
    """Check the answers of jobs that share a target, sample by sample; write each row as it is checked.

    Reads each video once more for all jobs, and checks equal answers once. A row that cannot be checked stays pending
    until the next resume=true. tell: see `sweep.take_turns`. Returns the exit codes of failures. With fail_fast, raises
    JobFailed for a wrong answer.
    """
    waiting = [(index, at, row) for at, job in enumerate(jobs) for index, row in unchecked(job)]
    if not waiting:
        return []
    jobs[0].held.clear()
    readings.forget()  # plugins have had access to them
    try:
        model = ReferenceModel.of(jobs[0].setup)
    except Exception as error:
        for at in {at for _, at, _ in waiting}:
            jobs[at].fail(error)
        return [tell(error)]
    codes, known = list[int](), dict[Any, Agreement]()
    for index, at, row in sorted(waiting, key=lambda found: found[:2]):
        job = jobs[at]
        try:
            with threads(job.cfg.threads), room(job.setup):
                found = _of_row(model, job, index, row, readings, known)
        except Exception as error:
            codes.append(ExitCode.FAILED)
            job.screen.note(line(f"{row['sample']} is not checked: {one_line(error)}"))
            if not isinstance(error, UserError):
                traceback.print_exception(error)
            continue
        assert job.rows is not None
        row |= result_keys(found, job.setup.target.tokenizer)
        job.rows.begin()
        job.rows.end(row)
        job.screen.checked(row, job.label)
        if job.cfg.fail_fast and job.code_of([row]):
            raise JobFailed(job.code_of([row]))
    return codes


def _of_row(
    model: ReferenceModel, job: Job, index: int, row: dict[str, Any], readings: Readings, known: dict[Any, Agreement]
) -> Agreement:
    """Check the answer of one row, unless `known` has the result. Raises UserError if the video has changed."""
    cfg, sample = job.cfg, job.key(index)
    asked = (sample, tuple(row["token_ids"]), cfg.max_new_tokens, cfg.repetition_penalty, cfg.check)
    if asked not in known:
        if sample not in readings:
            readings.forget()
        prompt = readings.get(sample, job.read(index)).prompt
        if len(prompt) != row["prompt_tokens"]:
            raise UserError(f"its prompt now has {len(prompt)} tokens, but had {row['prompt_tokens']}: the video has changed")
        known[asked] = model.check(prompt, *asked[1:4], cfg.check == "generate")
    return known[asked]
