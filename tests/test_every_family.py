"""The samples that packages of families take leave out no pruner and no drafter's ratio or position."""

import family_checks as checks
import family_folders


def test_every_pruner_meets_a_family_and_every_drafter_each_ratio_and_position(monkeypatch):
    met = []

    def decode(family, request, draft, pruner, drafter, **options):
        met.append((repr(pruner), repr(drafter), draft, options))
        return []

    monkeypatch.setattr(checks, "decode", decode)
    monkeypatch.setattr(checks, "answers", lambda family: {"video": []})
    for family in family_folders.FAMILIES:
        before = len(met)
        assert checks.unequal_strategies(family, every=False) == (len(met) - before, [])
    pruned = [(pruner, draft) for pruner, _, draft, options in met if "positions" not in options]
    assert {pruner for pruner, _ in pruned} == set(map(repr, checks.all_pruners()))
    assert {draft for _, draft in pruned} == {"draft", "small"} and len(pruned) > 2 * len(checks.all_pruners())
    ways = {(drafter, options["ratio"], options["positions"]) for _, drafter, _, options in met if "positions" in options}
    assert len(ways) == len(checks.all_drafters()) * len(checks.RATIOS) * len(checks.POSITIONS)
