"""Where tests take few crossings, no two options are left apart."""

from itertools import combinations, product

import pytest
from covering import covering, sampled


@pytest.mark.parametrize(("sizes", "most"), [((11, 6, 2), 66), ((7, 3, 2, 2), 21), ((3, 3, 2, 2), 10), ((2, 2), 4), ((5,), 0)])
def test_any_two_options_of_different_choices_meet(sizes, most):
    choices = [[f"{choice}{option}" for option in range(size)] for choice, size in enumerate(sizes)]
    found = covering(*choices)
    assert len(found) <= most
    for one, other in combinations(range(len(sizes)), 2):
        assert {(case[one], case[other]) for case in found} == set(product(choices[one], choices[other]))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("sizes", "most"), [((11, 6, 2), 13), ((7, 3, 2, 2), 8), ((4, 2, 2), 5), ((3, 3), 3), ((5, 3), 5)])
def test_a_sample_meets_every_option_and_nothing_is_left_out(sizes, most, pairs):
    choices = [[f"{choice}{option}" for option in range(size)] for choice, size in enumerate(sizes)]
    found = sampled(*choices, pairs=pairs)
    every = covering(*choices) if pairs else list(product(*choices))
    assert [param.values for param in found] == every
    sample = [param.values for param in found if not param.marks]
    assert {option for case in sample for option in case} == {option for options in choices for option in options}
    assert len(sample) <= most
    assert {mark.name for param in found for mark in param.marks} <= {"exhaustive"}
