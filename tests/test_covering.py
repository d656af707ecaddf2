"""Where tests take few crossings, no two options are left apart."""

from itertools import combinations, product

import pytest
from covering import covering


@pytest.mark.parametrize(("sizes", "most"), [((11, 6, 2), 66), ((7, 3, 2, 2), 21), ((3, 3, 2, 2), 10), ((2, 2), 4), ((5,), 0)])
def test_any_two_options_of_different_choices_meet(sizes, most):
    choices = [[f"{choice}{option}" for option in range(size)] for choice, size in enumerate(sizes)]
    found = covering(*choices)
    assert len(found) <= most
    for one, other in combinations(range(len(sizes)), 2):
        assert {(case[one], case[other]) for case in found} == set(product(choices[one], choices[other]))
