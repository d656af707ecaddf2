"""Decode a clip with one of specvlm's embedded pairs. Needs no GPU and no download.

python examples/decode.py
"""

from specvlm import DecodingGraph, Drafter, GenerationOptions, Pruner, Verifier, check_pair, load, read_video, registry
from specvlm.config import model_folder
from specvlm.video.clips import find_clip


def decode(
    pruner: Pruner | None = None, drafter: Drafter | None = None, verifier: Verifier | None = None, max_new_tokens: int = 256
) -> str:
    """Decode one answer, print it and the mean number of guesses accepted per round, and return it."""
    target, draft = load(model_folder("embedded:qwen2_5_vl/target")), load(model_folder("embedded:qwen2_5_vl/plain"))
    graph = DecodingGraph(
        target,
        draft,
        pruner=pruner or registry.build("pruner", {"name": "two_stage", "mass": 0.2}),
        drafter=drafter or registry.build("drafter", {"name": "tree", "shape": "chain:5"}),
        verifier=verifier or registry.build("verifier", "greedy"),
        vocabulary=check_pair(target, draft),
    )
    prompt = target.prompt("describe the video.", [read_video(find_clip("synthetic_1"), fps=2)])
    options = GenerationOptions(max_new_tokens=max_new_tokens, ratio=0.9)
    first, *rounds = graph.decode(prompt, options)  # the first step is the prefill, with one token
    tokens = [token for step in (first, *rounds) for token in step.tokens]
    text = target.tokenizer.decode(tokens, skip_special_tokens=True)
    print(text)
    full = [step.accepted for step in rounds if step.full]  # leave out a round that a stop id cut short
    print(f"{graph.pruner} {graph.drafter} {graph.verifier}: {sum(full) / max(1, len(full)):.2f} accepted a round")
    return text


if __name__ == "__main__":
    decode()
