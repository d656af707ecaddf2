"""The types that the parts of a decoding graph exchange."""

import pytest
import torch

from specvlm.types import PAPER_TREE, DraftTree, KeepSet, TokenGrid, TreeShape, Verdict, VideoPrompt, ancestor_mask


def test_grid_counts_the_newline_as_a_video_token_outside_the_frames():
    grid = TokenGrid(frames=4, height=3, width=5, newline=1)
    assert (len(grid), grid.cells, grid.per_frame) == (61, 60, 15)


def prompt(video_index, total=12, grids=None):
    index = torch.tensor(video_index, dtype=torch.int64)
    return VideoPrompt(torch.arange(total), index, grids if grids is not None else (TokenGrid(1, 1, len(video_index)),))


def test_prompt_is_cut_after_the_last_video_token():
    assert prompt([3, 4, 5]).cut == 6
    assert prompt([2, 3, 7, 8], grids=(TokenGrid(1, 1, 2), TokenGrid(2, 1, 1))).cut == 9
    assert prompt([], grids=()).cut == 0


def test_prompt_keeps_all_text_and_the_chosen_video_tokens():
    two = prompt([2, 3, 7, 8], total=10, grids=(TokenGrid(1, 1, 2), TokenGrid(2, 1, 1)))
    assert two.kept_slots(torch.tensor([1, 2])).tolist() == [0, 1, 3, 4, 5, 6, 7, 9]
    assert two.kept_slots(torch.tensor([], dtype=torch.int64)).tolist() == [0, 1, 4, 5, 6, 9]


def test_prompt_refuses_grids_that_do_not_fill_its_video_slots():
    with pytest.raises(ValueError, match=r"\[4\] tokens do not fill 3"):
        prompt([3, 4, 5], grids=(TokenGrid(1, 2, 2),))


@pytest.mark.parametrize("index", [[2, 1], [1, 1], [-1, 2], [0, 5]])
def test_keep_set_refuses_what_is_not_sorted_unique_and_in_range(index):
    with pytest.raises(ValueError, match=r"sorted, unique and within 0\.\.4"):
        KeepSet(torch.tensor(index), 5)


def test_keep_set_refuses_other_shapes_and_dtypes():
    with pytest.raises(ValueError, match="1-D int64"):
        KeepSet(torch.tensor([[0, 1]]), 5)
    with pytest.raises(ValueError, match="1-D int64"):
        KeepSet(torch.tensor([0, 1], dtype=torch.int32), 5)
    with pytest.raises(ValueError, match=r"pool must be \(2, 5\)"):
        KeepSet(torch.tensor([0, 1]), 5, torch.zeros(5, 2))


def test_keep_set_may_be_empty_or_everything():
    assert len(KeepSet(torch.tensor([], dtype=torch.int64), 5)) == 0
    assert KeepSet.everything(5).index.tolist() == [0, 1, 2, 3, 4]


def test_top_takes_the_earlier_of_equal_scores():
    assert KeepSet.top(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).index.tolist() == [1, 2, 3]
    assert KeepSet.top(torch.full((1000,), 0.5, dtype=torch.bfloat16), 7).index.tolist() == list(range(7))
    assert KeepSet.top(torch.tensor([-torch.inf, 0.0, -torch.inf]), 2).index.tolist() == [0, 1]


def test_top_refuses_nan():
    with pytest.raises(ValueError, match="cannot rank 3 video tokens: 1 of their scores are NaN"):
        KeepSet.top(torch.tensor([1.0, torch.nan, 2.0]), 2)


def test_uniform_is_linspace_cut_to_whole_numbers():
    assert KeepSet.uniform(10, 4).index.tolist() == [0, 3, 6, 9]
    assert KeepSet.uniform(10, 3).index.tolist() == [0, 4, 9]
    assert KeepSet.uniform(10, 1).index.tolist() == [0]
    assert KeepSet.uniform(10, 0).index.tolist() == []
    assert KeepSet.uniform(0, 0).index.tolist() == []
    for total in (1, 2, 17, 784):
        for budget in range(1, total + 1, max(1, total // 50)):
            wanted = [i * (total - 1) // max(budget - 1, 1) for i in range(budget)]
            assert KeepSet.uniform(total, budget).index.tolist() == wanted


def test_the_budget_is_the_floor_of_the_decimal_share_for_every_ratio():
    assert KeepSet.budget(480, 0.9) == 48 and int(480 * (1 - 0.9)) == 47
    for total in (*range(1, 130), 480, 576, 8190, 16384, 131072, 2**22 - 1):
        for thousandths in range(1000):
            assert KeepSet.budget(total, thousandths / 1000) == total * (1000 - thousandths) // 1000


def test_paper_tree_has_25_nodes_15_leaves_and_five_drafter_passes():
    tree = TreeShape.parse("paper")
    assert len(tree) == 26
    assert [tree.depths.count(depth) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert sum(not below for below in tree.children) == 15
    assert [len(level) for level in tree.levels] == [1, 4, 4, 1, 1]
    assert tree.depth == 5


def test_tree_from_paths_does_not_depend_on_their_order():
    assert TreeShape.from_paths(PAPER_TREE[::-1]) == TreeShape.from_paths(PAPER_TREE)


def test_tree_parses_chains_widths_and_literals(tmp_path):
    assert TreeShape.parse("chain:3") == TreeShape((-1, 0, 1, 2), (0, 0, 0, 0))
    assert TreeShape.parse("2x1") == TreeShape((-1, 0, 0, 1, 2), (0, 0, 1, 0, 0))
    literal = TreeShape.parse("[[0],[1],[0,0]]")
    assert literal.parents == (-1, 0, 0, 1)
    (tmp_path / "tree.json").write_text("[[0],[1],[0,0]]")
    assert TreeShape.parse(str(tmp_path / "tree.json")) == literal


def test_tree_children_come_best_first():
    assert TreeShape((-1, 0, 0, 0), (0, 2, 0, 1)).children[0] == (2, 3, 1)


@pytest.mark.parametrize("text", ["", "chain", "chain:0", "0x2", "papper", "[1]", "[[0,0]]", "[[-1]]", "none.json", "7.5"])
def test_tree_refuses_what_is_no_tree_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]*tree[^\n]*$"):
        TreeShape.parse(text)


def test_parents_come_before_children_in_every_tree():
    for text in ("paper", "chain:7", "3x2x2"):
        tree = TreeShape.parse(text)
        assert all(parent < node for node, parent in enumerate(tree.parents))


def test_mask_shows_each_node_itself_and_its_ancestors_only():
    # 0 - 1 - 3 and 0 - 2 - 4
    mask = ancestor_mask((-1, 0, 0, 1, 2))
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]


def test_mask_of_a_chain_is_causal():
    assert torch.equal(ancestor_mask((-1, 0, 1, 2)), torch.ones(4, 4).tril().bool())


def test_mask_row_has_one_entry_a_level():
    tree = TreeShape.parse("paper")
    draft = DraftTree(torch.arange(len(tree)), tree.parents)
    assert draft.mask.sum(1).tolist() == [depth + 1 for depth in draft.depths]
    assert draft.depths == tree.depths


def test_verdict_does_not_count_the_bonus_token():
    assert Verdict((0, 2, 4), bonus=7).accepted == 2


def test_refused_is_the_line_of_best_guesses_behind_the_accepted_ones():
    tree = DraftTree(torch.tensor([5, 10, 11, 12, 13, 14]), (-1, 0, 0, 1, 1, 3))
    assert tree.refused((0,)) == (10, 12, 14)
    assert tree.refused((0, 1)) == (12, 14) and tree.refused((0, 1, 4)) == tree.refused((0, 2)) == ()
    ranked = DraftTree(tree.tokens, tree.parents, ranks=(0, 1, 0, 2, 1, 0))
    assert ranked.refused((0,)) == (11,) and ranked.refused((0, 1)) == (13,)


def test_a_copy_without_pixels_has_no_videos_and_images_to_list():
    grid, video, image = TokenGrid(1, 1, 2), {"x": torch.ones(1)}, {"tokens": 1}
    prompt = VideoPrompt(torch.arange(5), torch.tensor([2, 3]), (grid,), (video,), (image,), torch.tensor([1]))
    assert prompt.items == [image, video]
    assert prompt.copy(pixels=False).items == []
