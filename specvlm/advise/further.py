"""Measure the cost of another question about the same video."""

from dataclasses import replace

import torch

from specvlm.app.console import seconds
from specvlm.decoding.loop import DecodingGraph
from specvlm.decoding.prefixes import PrefixStore
from specvlm.results import metrics
from specvlm.types import VideoPrompt


def further(graph: DecodingGraph, prompt: VideoPrompt) -> list[str]:
    """Measure the time to first token of another question about the same video. Returns the result as one line of text.

    Returns no line if the prompt has no video, or an image after it.
    """
    if not prompt.cut or prompt.text != prompt.cut:
        return []
    graph, tail = replace(graph, prefixes=PrefixStore(2**62)), prompt.tokens[prompt.cut :]
    firsts = []
    for tokens in (tail, tail.flip(0), tail.roll(1)):  # the second one warms up code that only a later question runs
        asked = replace(prompt, tokens=torch.cat([prompt.tokens[: prompt.cut], tokens]))
        (step,) = graph.decode(asked, 1)
        firsts.append(metrics.speed_of([step])["time_to_first_token_s"])
    return [
        f"Another question about the same video has its first token after {seconds(firsts[-1])} instead of "
        f"{seconds(firsts[0])}, as long as its rows are kept (prefixes=…)."
    ]
