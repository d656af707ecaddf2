"""Built-in drafters, brought in through the same hook as a plugin's."""

from specvlm.drafters.dynamic_tree import DynamicTreeDrafter
from specvlm.drafters.entropy_tree import EntropyTreeDrafter
from specvlm.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.drafters.self_draft import SelfDrafter
from specvlm.drafters.sparse import SparseDrafter
from specvlm.drafters.tree import TreeDrafter
from specvlm.plugins import hookimpl


@hookimpl
def specvlm_strategies() -> list[type]:
    return [TreeDrafter, DynamicTreeDrafter, EntropyTreeDrafter, SelfDrafter, SparseDrafter, PromptLookupDrafter]
