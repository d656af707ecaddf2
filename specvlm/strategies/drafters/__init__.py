"""Built-in drafters, one per file, registered through the same hook as plugins."""

from specvlm.strategies.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.strategies.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.strategies.drafters.overlap import OverlapDrafter
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.strategies.drafters.self_draft import SelfDrafter
from specvlm.strategies.drafters.sparse import SparseDrafter
from specvlm.strategies.drafters.tree import TreeDrafter
from specvlm.strategies.plugins import hookimpl


@hookimpl
def specvlm_strategies() -> list[type]:
    trees = [TreeDrafter, OverlapDrafter, DynamicTreeDrafter, EntropyTreeDrafter, SelfDrafter]
    return [*trees, SparseDrafter, PromptLookupDrafter]
