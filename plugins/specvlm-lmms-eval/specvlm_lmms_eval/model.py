"""The model class: lmms-eval's requests, several at once, answered by a session of specvlm."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

import specvlm
from specvlm import UserError
from specvlm.errors import one_line
from specvlm.video.clips import find_clip
from specvlm.video.video import probe
from specvlm_lmms_eval.arguments import call_options, chosen_for_check, messages_of, pair_arguments

# What the sample log says about an answer besides its verdict, under the names of `GenerationResult.statistics`.
LOGGED = ("tokens_per_round", "accepted_per_round", "rounds", "kept_tokens", "video_tokens", "frames")


@dataclass
class AnswerCounts(TokenCounts):
    """Token counts of an answer and facts about its decoding. lmms-eval writes `to_dict` to its log of samples."""

    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and all of `about`."""
        return {**super().to_dict(), **self.about}


class SpecVLM(lmms):
    """A target, a draft and default options of their calls.

    Args:
        pretrained: The target: a folder, a name on the hub, or "embedded:qwen2_5_vl".
        draft: The draft, in the same form.
        batch_size: Number of requests in flight. They share forward passes; answers do not depend on it.
        max_batch_size: Not used; lmms-eval passes it to every model.
        device: As in `specvlm.load_pair`. With several processes, "auto" is the GPU of each one's local rank.
        check: Share of the answers to compare with the target alone, 0 to 1; true is all.
        max_num_frames: Most frames of a video file, evenly spaced. None: the family's own rule.
        settings: Other arguments of `specvlm.load_pair`, and `specvlm.Options`.

    Raises:
        UserError: A setting cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        draft: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        check: float = 0,
        max_num_frames: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise UserError("model_args: there is no pretrained=…, the target: a folder, a name or embedded:qwen2_5_vl")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: expected a number of requests in flight, 1 or more")
        if isinstance(check, str) or not 0 <= check <= 1:
            raise UserError(f"model_args: check={check}: expected true, false or a share of the answers, 0 to 1")
        if max_num_frames is not None and (not isinstance(max_num_frames, int) or max_num_frames < 1):
            raise UserError(f"model_args: max_num_frames={max_num_frames}: expected a number of frames, 1 or more")
        if max_num_frames is not None and {"frames", "fps"} & settings.keys():
            raise UserError("model_args: max_num_frames, frames and fps cannot be combined: leave out max_num_frames")
        self.batch_size, self.check, self.max_num_frames = int(batch_size), float(check), max_num_frames
        given = pair_arguments(settings)
        self.session = specvlm.load_pair(pretrained, draft, device=_own_device(device), **given)
        self.device = self.session.target.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SpecVLM:
        """Build the model of a command line. A setting that cannot be used ends it with one line and exit code 2.

        lmms-eval itself would print a traceback and exit with 0.
        """
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except UserError as error:
            print(f"specvlm: {one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from None

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, `batch_size` at once. Returns the answers in the order of the requests."""
        options, seen = [], Counter[int]()
        for number, request in enumerate(requests):
            options.append(self._options(request, number, seen[id(request)]))
            seen[id(request)] += 1
        begun, before = perf_counter(), (self.session.scheduler.asked, self.session.scheduler.run)
        with ThreadPoolExecutor(self.batch_size, "specvlm") as pool:
            answers = pool.map(self._answer, requests, options)
            results = list(tqdm(answers, "Model Responding", len(requests), disable=self.rank != 0))
        self._report(results, perf_counter() - begun, before)
        return results

    def _options(self, request: Instance, number: int, copy: int) -> dict[str, Any]:
        """Return the options of a request. Called for all before the first is answered, so that errors come early.

        copy: Number of the request's copy with `--repeats`.
        """
        default = self.session.options
        options = call_options(request.args[2], default)
        graph = self.session.graph(default.asked(options))
        sampled = graph.sampling.temperature > 0
        known = not graph.lossless or (sampled and not graph.sampling.coupled)  # a verdict that costs nothing
        seed = options.get("seed", default.seed) + (copy if sampled else 0)
        return options | {"seed": seed, "check": known or chosen_for_check(number, self.check)}

    def _answer(self, request: Instance, options: dict[str, Any]) -> GenerationResult:
        context, doc_to_messages, kwargs, doc_id, task, split = request.args
        try:
            messages = messages_of(doc_to_messages(self.task_dict[task][split][doc_id]), self._video)
            result = self.session.generate(messages, **options)
        except UserError as error:
            raise UserError(f"{task}, sample {doc_id}: {error}") from error
        self.cache_hook.add_partial("generate_until", (context, kwargs), result.text)
        known = result.statistics
        about = {name: known[name] for name in LOGGED} | {"finish_reason": result.finish_reason, "verdict": result.verdict}
        return GenerationResult(result.text, AnswerCounts(known["prompt_tokens"], known["new_tokens"], about=about))

    def _video(self, video: Any) -> Any:
        """Read at most `max_num_frames` of a video file. Without a limit, or for anything else, return it unchanged."""
        if self.max_num_frames is None or not isinstance(video, str | Path):
            return video
        path, reader = find_clip(str(video)), self.session.options.reader
        return specvlm.read_video(path, frames=min(self.max_num_frames, probe(path, reader).frames), reader=reader)

    def _report(self, results: Sequence[GenerationResult], seconds: float, before: tuple[int, int]) -> None:
        """Log the numbers of these answers. lmms-eval writes them to its results, under `throughput`."""
        counts = [result.token_counts.to_dict() for result in results]
        tokens, rounds = (sum(count[name] for count in counts) for name in ("output_tokens", "rounds"))
        verdicts = Counter(count["verdict"] for count in counts)
        logger.info("specvlm: {} answers: {}", len(counts), ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
        asked, run = self.session.scheduler.asked - before[0], self.session.scheduler.run - before[1]
        further = {"passes_asked": asked, "passes_run": run, "new_tokens_per_round": (tokens - len(counts)) / max(rounds, 1)}
        log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), further)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused."""
        raise UserError("specvlm answers generate_until tasks: tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused."""
        raise UserError("specvlm answers generate_until tasks: log-likelihoods are not supported")

    def clean(self) -> None:
        """Free the models. lmms-eval calls this after the last answer, before judges may be loaded."""
        del self.session
        super().clean()


def _own_device(device: str | None) -> str:
    """Return the device of this process. Of several processes, each has the GPU of its local rank by default."""
    rank = os.environ.get("LOCAL_RANK")
    if device in (None, "auto", "cuda") and rank and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    return device or "auto"
