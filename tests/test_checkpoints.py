"""Checkpoint folders: read as Hugging Face reads them, or refused in one line before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specvlm.__main__ import main
from specvlm.config import model_folder
from specvlm.engine.lean import why_not
from specvlm.errors import UserError
from specvlm.models import generation
from specvlm.models.checkpoint import check_numbers
from specvlm.models.layer_kinds import check_windows
from specvlm.models.load import dtype_of, load, skeleton
from specvlm.video.settings import read_video_settings

FAST = ["frames=4", "max_new_tokens=3", "baseline=false"]
FAMILIES = ("qwen2_5_vl", "llava_onevision")


def copied(place: Path, family: str = "qwen2_5_vl", **edits) -> Path:
    """Copy the embedded target, with its weights linked and JSON files edited: `config_json` is config.json."""
    folder = place / "model"
    source = model_folder(f"embedded:{family}/target")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    for name, edit in edits.items():
        path = folder / ".".join(name.rsplit("_", 1))
        content = json.loads(path.read_text()) if path.exists() else {}
        edit(content)
        path.write_text(json.dumps(content))
    return folder


def refused(folder: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        skeleton(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def setting(**values):
    return lambda content: content.update(values)


# ---- weights: safetensors in the folder alone ------------------------------------------------------------------------


def in_shards(folder: Path, names: dict[str, str]) -> Path:
    """Split the weights into two files, with an index that assigns some tensors to other files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(place.values()):
        save_file({n: weights[n].clone() for n in weights if place[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place | names}))
    return folder


OUTSIDE = (
    "pytorch_model.bin",
    "../x.safetensors",
    "/tmp/x.safetensors",
    "sub/x.safetensors",
    ".safetensors",
    "x.safetensors.bin",
)


@pytest.mark.parametrize("name", [*OUTSIDE, 7, None])
def test_an_index_that_names_anything_but_safetensors_in_the_folder_is_refused(name, tmp_path):
    (tmp_path / "x.safetensors").symlink_to(model_folder("embedded:qwen2_5_vl/target") / "model.safetensors")
    folder = in_shards(copied(tmp_path), {"lm_head.weight": name})
    refused(folder, r"only \*.safetensors in the folder itself are read")


@pytest.mark.parametrize("name", [*OUTSIDE, "adapter_model.bin", "../x.safetensors.index.json", 3])
def test_config_json_may_name_no_other_weights(name, tmp_path):
    refused(copied(tmp_path, config_json=setting(transformers_weights=name)), "safetensors in the folder itself")


def test_weights_in_shards_under_a_name_of_their_own_are_read(tmp_path):
    folder = in_shards(copied(tmp_path), {})
    shards = load(folder)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "other.safetensors.index.json"}
    (folder / "config.json").write_text(json.dumps(config))
    for ours, theirs in zip(load(folder).hf.parameters(), shards.hf.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_is_not_passed_over(tmp_path):
    refused(copied(tmp_path, adapter_config_json=setting(base_model_name_or_path="x/y")), "merge the adapter")


def test_a_missing_shard_and_a_folder_of_a_pickle_are_refused(tmp_path):
    folder = in_shards(copied(tmp_path), {"lm_head.weight": "part-7.safetensors"})
    refused(folder, "part-7.safetensors is not there")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert skeleton(folder).quantised is None  # a report needs no weights
    with pytest.raises(UserError, match=r"no \*.safetensors weights"):
        load(folder)


# ---- dtype, attention ------------------------------------------------------------------------------------------------


def without_dtype(content):
    content.pop("dtype", None)
    content["text_config"].pop("dtype", None)


def as_before(content):
    content["torch_dtype"] = content.pop("dtype")


def of_a_part_alone(content):
    content["text_config"]["dtype"] = "float32"  # of no account to Hugging Face beside weights in another
    content.pop("dtype")


@pytest.mark.parametrize("edit", [without_dtype, as_before, of_a_part_alone])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_planned_is_the_one_loaded(family, edit, tmp_path):
    folder = copied(tmp_path, family, config_json=edit)
    loaded = load(folder, weights="bf16")
    assert dtype_of(skeleton(folder), "auto") == loaded.dtype == torch.bfloat16
    assert {weight.dtype for weight in loaded.hf.parameters()} == {torch.bfloat16}


def test_the_first_floating_point_tensor_gives_the_dtype(tmp_path):
    folder = copied(tmp_path, config_json=without_dtype)
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.arange(3), **weights}, folder / "model.safetensors", {"format": "pt"})
    assert dtype_of(skeleton(folder), "auto") == load(folder).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["int8", "nope", "float8_e4m3fn"])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype, tmp_path):
    refused(copied(tmp_path, config_json=setting(dtype=dtype)), "config.json")


@pytest.mark.parametrize("named", ["flash_attention_2", "eager", "flex_attention", "kernels-community/flash-attn3", "nope"])
@pytest.mark.parametrize("where", ["", "text_config", "vision_config"])
def test_whatever_attention_config_json_names_ours_takes_its_place(named, where, tmp_path):
    def name_it(content):
        (content[where] if where else content)["_attn_implementation"] = named

    loaded = load(copied(tmp_path, config_json=name_it))
    assert loaded.hf.config._attn_implementation != named
    assert loaded.hf.config.text_config._attn_implementation.startswith("specvlm")


# ---- quantised ---------------------------------------------------------------------------------------------------------

METHODS = {  # what the message says to install
    "awq": "pip install gptqmodel",
    "gptq": "pip install optimum",
    "bitsandbytes": "pip install -U bitsandbytes",
    "compressed-tensors": "pip install compressed-tensors",
    "torchao": "pip install torchao",
    "aqlm": "pip install aqlm",
    "hqq": "pip install hqq",
}


@pytest.mark.parametrize("where", ["", "text_config"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_without_its_library_is_refused_before_anything_is_read(method, where, tmp_path, monkeypatch):
    def quantised(content):
        more = {"load_in_4bit": True} if method == "bitsandbytes" else {}
        more |= {"quant_type": "int4_weight_only"} if method == "torchao" else {}
        (content[where] if where else content)["quantization_config"] = {"quant_method": method, "bits": 4, **more}

    monkeypatch.setattr("specvlm.models.checkpoint.tensors_in", lambda *_: pytest.fail("weights were read"))
    refused(copied(tmp_path, config_json=quantised), METHODS[method])


@pytest.mark.parametrize("found", [{"quant_method": "nope"}, {"quant_method": 3}, {"x": 1}, [1], "awq"])
def test_a_quantisation_that_nobody_knows_is_refused(found, tmp_path):
    refused(copied(tmp_path, config_json=setting(quantization_config=found)), "quanti")


def test_a_mistake_of_quantisation_ends_with_code_2_and_one_line(tmp_path, monkeypatch, capfd):
    folder = copied(tmp_path, config_json=setting(quantization_config={"quant_method": "awq", "bits": 4}))
    monkeypatch.chdir(tmp_path)
    assert main([f"target.path={folder}", "video=nowhere.mp4", *FAST]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "pip install gptqmodel" in error


def test_a_quantised_checkpoint_runs_eager_keeps_its_files_size_and_is_not_quantised_again(tmp_path, monkeypatch):
    lm = skeleton(copied(tmp_path))
    assert lm.quantised is None
    lm.hf.config.quantization_config = {"quant_method": "awq", "bits": 4}
    quantised = type(lm)(lm.hf, lm.tokenizer, lm.folder)
    assert why_not(quantised) == "its checkpoint is quantised by awq"
    from specvlm.models import memory_plan
    from specvlm.models.load import kind_of, spread_of
    from specvlm.parallel.ranks import SINGLE

    with pytest.raises(UserError, match="target.weights=int8, but the checkpoint is quantised already, by awq"):
        kind_of("int8", torch.bfloat16, "target.weights", "awq")
    with pytest.raises(UserError, match="runs on one device"):
        spread_of(lm.hf.config, [(3, torch.device("cpu"))], SINGLE, None, "cpu")
    monkeypatch.setattr(memory_plan, "packed_bytes", lambda *_: 123)
    cpu = torch.device("cpu")
    assert memory_plan.weights(memory_plan.Need(quantised, 1, torch.bfloat16), [(quantised.layers, cpu)]) == {cpu: 123}


def test_experts_held_as_one_tensor_stay_in_full_and_that_is_said(monkeypatch):
    from transformers import Qwen2MoeConfig, Qwen2MoeModel

    from specvlm.models.quantize import left_full, quantize_text
    from specvlm.testing.tiny import built

    plain = built("llava_onevision", 97)
    quantize_text(plain, "int8")
    assert left_full(plain, "int8") == ""
    mixed = built("llava_onevision", 97)
    of = mixed.config.text_config
    config = Qwen2MoeConfig(
        vocab_size=97, hidden_size=of.hidden_size, num_hidden_layers=2, num_attention_heads=of.num_attention_heads,
        num_key_value_heads=of.num_key_value_heads, num_experts=4, moe_intermediate_size=32, intermediate_size=64,
        decoder_sparse_step=1, shared_expert_intermediate_size=32,
    )  # fmt: skip
    mixed.model.language_model = Qwen2MoeModel(config)
    quantize_text(mixed, "int8")
    experts = [weight for name, weight in mixed.model.language_model.layers.named_parameters() if weight.dim() > 1]
    assert "experts" in left_full(mixed, "int8")
    assert f"leaves {sum(weight.nbytes for weight in experts) / 2**20:.1f} MiB unquantised" in left_full(mixed, "int8")


# ---- the generation config ---------------------------------------------------------------------------------------------


def test_every_setting_of_the_installed_generation_config_is_applied_or_harmless_or_named():
    from transformers import GenerationConfig

    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert set(generation.APPLIED) <= fields and not generation.HARMLESS & set(generation.APPLIED)
    for name in fields - generation.HARMLESS - set(generation.APPLIED):
        config = GenerationConfig()
        setattr(config, name, 0.7)
        assert list(generation.not_applied(config)) == [name]
        for neutral in (None, False, [], *generation.NEUTRAL.get(name, ())):
            setattr(config, name, neutral)
            assert list(generation.not_applied(config)) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"encoder_no_repeat_ngram_size": 3}, ["encoder_no_repeat_ngram_size"]),
        ({"watermarking_config": {"bias": 2.0}}, ["watermarking_config"]),
        ({"forced_bos_token_id": 0, "num_beams": 4}, ["forced_bos_token_id", "num_beams"]),
        ({"stop_strings": ["."], "max_time": 3}, ["max_time", "stop_strings"]),
        ({"guidance_scale": 1.5, "do_sample": True, "temperature": 1e-6}, ["guidance_scale"]),
        ({"cache_implementation": "quantized"}, ["cache_implementation"]),
        ({"cache_implementation": "static", "num_beams": 1, "min_length": 0, "top_k": 5, "repetition_penalty": 1.1}, []),
    ],
)
def test_settings_that_change_greedy_output_are_named(settings, named, tmp_path):
    folder = copied(tmp_path, generation_config_json=setting(**settings))
    assert sorted(skeleton(folder).ignored_settings) == sorted(load(folder).ignored_settings) == named


def test_a_field_that_a_later_transformers_has_is_named_by_itself(monkeypatch):
    from transformers import GenerationConfig

    config, plain = GenerationConfig(), GenerationConfig.__init__

    def later(self, **values):
        plain(self, **values)
        self.think_harder = None

    config.think_harder = 3
    monkeypatch.setattr(GenerationConfig, "__init__", later)
    assert list(generation.not_applied(config)) == ["think_harder"]


# ---- files that are broken -----------------------------------------------------------------------------------------------


SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "processor_config.json", "model.safetensors.index.json", "chat_template.json"),
    "special_tokens_map.json",
)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_that_is_cut_or_of_another_type_is_refused_in_one_line(name, tmp_path):
    folder = copied(tmp_path)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    path = folder / name
    whole = path.read_bytes() if path.exists() else b'{"a": [1, 2]}'
    for content in (whole[: len(whole) // 2], b"", b"[1]", b'"x"', b"null", b"\xff\xfe\x00", b"[" * 50_000):
        path.write_bytes(content)
        refused(folder, folder.name)
        with pytest.raises(UserError):
            load(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eos_token_id": "abc"}, "eos_token_id='abc'"),
        ({"eos_token_id": [3, -1]}, "eos_token_id"),
        ({"repetition_penalty": "a lot"}, "repetition_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_generation_settings_of_the_wrong_type_are_refused(values, said, tmp_path):
    refused(copied(tmp_path, generation_config_json=setting(**values)), said)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"depth": 10**6}),
        ("text_config", {"max_position_embeddings": 10**400}),
        ("text_config", {"rope_theta": float("nan")}),
        ("text_config", {"hidden_size": 10**12}),
        ("text_config", {"vocab_size": 10**8}),
        ("text_config", {"num_attention_heads": 0}),
        ("text_config", {"hidden_act": "nope"}),
        ("text_config", {"intermediate_size": -5}),
    ],
)
def test_a_config_of_a_model_that_cannot_be_is_refused_at_once(part, values, tmp_path):
    refused(copied(tmp_path, config_json=lambda content: content[part].update(values)), "config.json")


def test_sizes_that_real_models_have_are_no_counts(tmp_path):
    real = dict(shared_expert_intermediate_size=20480, block_size=4096, max_position_embeddings=10_485_760, rope_theta=1e10)
    skeleton(copied(tmp_path, config_json=lambda content: content["text_config"].update(real)))


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_config", {"num_heads": 7}),
        ("text_config", {"rope_parameters": {"mrope_section": [8, 8, 9], "rope_theta": 1000.0, "rope_type": "default"}}),
        ("text_config", {"rms_norm_eps": "small"}),
        ("vision_config", {"tokens_per_second": "two"}),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_when_they_are_loaded(part, values, tmp_path):
    folder = copied(tmp_path, config_json=lambda content: content[part].update(values))
    with pytest.raises(UserError, match="config.json"):
        load(folder)


BAD_SETTINGS = {
    "patch_size": (0, -14, 14.5, "14", True, 10**9),
    "fps": (0, -1, "2", float("nan"), float("inf")),
    "max_frames": (0, -3, 2.5, "many"),
    "image_mean": (0.5, [0.5], ["a", "b", "c"], [float("nan")] * 3),
    "image_std": ([0, 1, 1], [-1.0] * 3),
    "rescale_factor": (0, "x"),
    "do_resize": ("no", 3),
    "size": ({"shortest_edge": 10**12, "longest_edge": 10**13}, {"shortest_edge": -1, "longest_edge": 5}),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_video_settings_of_the_wrong_type_or_size_are_refused(name, tmp_path):
    for value in BAD_SETTINGS[name]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(UserError, match="expected"):
            read_video_settings(tmp_path, ("Qwen2VL",))


def test_a_processor_for_other_frames_or_patches_than_the_models_is_refused(tmp_path):
    cut = copied(tmp_path / "cut", config_json=lambda content: content["vision_config"].update(patch_size=7))
    refused(cut, "patch_size is 14 for the processor and 7 for the model")
    edit = setting(size={"height": 448, "width": 448})
    refused(copied(tmp_path, "llava_onevision", video_preprocessor_config_json=edit), "448x448 for the processor, 224")


def test_every_kind_of_sliding_window_is_refused():
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3VLMoeTextConfig

    unused = Qwen3VLMoeTextConfig(sliding_window=32768, use_sliding_window=False)
    for whole in (LlamaConfig(), MistralConfig(sliding_window=None), Qwen2Config(), unused):
        check_windows("folder", whole)
    windows = Qwen2Config(use_sliding_window=True, max_window_layers=1, num_hidden_layers=2)
    for config in (MistralConfig(), windows):
        with pytest.raises(UserError, match="folder: has layers of sliding-window attention, which are not supported"):
            check_windows("folder", config)


@pytest.mark.parametrize(
    ("number", "told"), [(2**40, "at most"), (-(2**40), "at least"), (float("inf"), "at most"), (float("nan"), "at most")]
)
def test_numbers_that_no_model_can_be_built_with_are_refused(number, told):
    with pytest.raises(UserError, match=f"key=.* in config.json: {told} .* can be loaded"):
        check_numbers(Path("folder"), {"part": [{"key": number}]})


@pytest.mark.parametrize("number", [-3.4e38, 1e300, -1.0, 2**31, -(2**31)])
def test_masks_and_other_usual_numbers_are_loaded(number):
    check_numbers(Path("folder"), {"part": [{"mask_value": number}]})
