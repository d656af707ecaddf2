"""Accept guesses that equal the target's best token, if the target is confident in it."""

from dataclasses import dataclass

from specvlm import Verdict, Verifier, VerifyContext, hookimpl


@dataclass(frozen=True)
class SureVerifier(Verifier):
    """Greedy verification that accepts a guess only if the target's best logit leads the second best by `margin`.

    margin: lead in logits; 0 is plain greedy verification.

    Lossless: after a rejected guess, the target's own best token follows. Cost: one copy of M numbers to the host.
    """

    name = "sure"
    margin: float = 0.0

    def verify(self, ctx: VerifyContext) -> Verdict:
        top_M2 = ctx.logits_MV.topk(2).values
        best = ctx.logits_MV.argmax(-1).tolist()  # ties go to the lowest id, as in plain decoding
        sure = ((top_M2[:, 0] - top_M2[:, 1]) >= self.margin).tolist()
        guesses, path = ctx.tree.tokens.tolist(), [0]
        while sure[path[-1]]:
            here = path[-1]
            below = [node for node, parent in enumerate(ctx.tree.parents) if parent == here and guesses[node] == best[here]]
            if not below:
                break
            path.append(below[0])
        return Verdict(tuple(path), best[path[-1]])


@hookimpl
def specvlm_strategies() -> list[type]:
    return [SureVerifier]


if __name__ == "__main__":
    from decode import decode

    decode(verifier=SureVerifier(margin=1.0))
