"""Layers that cannot be checked or cut back are refused before any weight is read, by what the configuration says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers
from family_folders import FAMILIES
from transformers import CONFIG_MAPPING, Qwen2Config, Qwen3NextConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specvlm.errors import UserError
from specvlm.models.adopt import adopted
from specvlm.models.layer_kinds import check_states, check_windows, language_model, name_of_text
from specvlm.models.load import load, skeleton

WHY = "keep one state instead of a row for each token, so a rejected guess cannot be cut back"


@pytest.mark.parametrize("read", [skeleton, load])
@pytest.mark.parametrize(("model_type", "count"), [("qwen3_5", "24 of its 32"), ("qwen3_5_moe", "30 of its 40")])
def test_qwen3_5_is_refused_by_its_configuration_alone(tmp_path, model_type, count, read):
    """The folder has neither weights nor a tokenizer, and no family is installed."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}: {count} layers are linear attention: they {WHY}$"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["linear_attention", "mamba", "conv", "hybrid", "recurrent", "gated_delta_net"])
@pytest.mark.parametrize("field", ["layer_types", "layers_block_type", "block_types"])
def test_a_state_is_found_by_the_kinds_of_layers_whatever_the_model_is_called(kind, field):
    config = Qwen2Config(num_hidden_layers=4)
    config.layer_types = None
    setattr(config, field, [kind, "sliding_attention", "full_attention", kind])
    with pytest.raises(UserError, match=f"^x: 2 of its 4 layers are {kind.replace('_', ' ')}: they {WHY}$"):
        check_states("x", config)


def test_of_a_configuration_with_several_texts_the_whole_is_read():
    def several():
        raise ValueError("several text configurations")

    config = SimpleNamespace(get_text_config=several, layer_types=["mamba", "full_attention"])
    with pytest.raises(UserError, match=r"^x: 1 of its 2 layers are mamba: "):
        check_states("x", config)


def test_kinds_that_repeat_are_counted_over_all_layers():
    config = CONFIG_MAPPING["recurrent_gemma"](num_hidden_layers=7)
    config.block_types = ["recurrent", "recurrent", "attention"]
    with pytest.raises(UserError, match=r"^x: 5 of its 7 layers are "):
        check_states("x", config)


@pytest.mark.slow
def test_every_model_that_transformers_calls_stateful_is_refused():
    tried = []
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if getattr(getattr(transformers, name), "_is_stateful", False) and "nemotron3" not in model_type:
            tried.append(model_type)
            config = CONFIG_MAPPING[model_type]()
            with pytest.raises(UserError, match=rf"^x: .*({WHY}|attention, which are not supported)$"):
                check_states("x", config)
                check_windows("x", config)
    assert {"qwen3_next", "mamba", "rwkv", "jamba", "falcon_h1"} <= set(tried), tried


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_a_model_of_an_unknown_type_is_said_to_be_one_whatever_its_windows(tmp_path, model_type):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model type '{model_type}' is not supported"):
        skeleton(tmp_path)


def test_a_loaded_model_is_refused_alike():
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    sizes = dict(linear_num_key_heads=1, linear_num_value_heads=1, num_experts=0, vocab_size=9, pad_token_id=None)
    hf = transformers.Qwen3NextForCausalLM(Qwen3NextConfig(**text, **sizes, layer_types=["linear_attention", "full_attention"]))
    with pytest.raises(UserError, match=rf"^Qwen3NextForCausalLM: 1 of its 2 layers are linear attention: they {WHY}$"):
        adopted(hf.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_found_in_every_family(family):
    hf = FAMILIES[family][0](True)
    check_states("x", hf.config)
    check_windows("x", hf.config)
    name = "text_model" if family == "smolvlm" else "language_model"
    assert name_of_text(hf) == name and language_model(hf) is getattr(hf.model, name)
