"""Write two tiny random checkpoints of a model family, for `specvlm.testing.check_family`: a target and a draft.

    python examples/tiny_checkpoints.py FOLDER

writes FOLDER/target and FOLDER/draft, of VideoLLaMA 3. For your own family change `build`, the special tokens, the chat
template and the settings of the processors. No network is needed: the tokenizer has one token for each byte.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, VideoLlama3Config, VideoLlama3ForConditionalGeneration

END, PAD, IMAGE, VIDEO = "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = [PAD, "<|im_start|>", END, IMAGE, VIDEO]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>\n{% elif part['type'] == 'video' %}<|video_pad|>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = dict(
    processor_class="VideoLlama3Processor", do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3,
    rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=14, temporal_patch_size=1,
)  # fmt: skip
IMAGES = PIXELS | dict(
    image_processor_type="VideoLlama3ImageProcessor", merge_size=1, size={"shortest_edge": 784, "longest_edge": 7840},
)  # fmt: skip
VIDEOS = PIXELS | dict(
    video_processor_type="VideoLlama3VideoProcessor", merge_size=2, size={"shortest_edge": 3136, "longest_edge": 75264},
    do_sample_frames=True, fps=1, min_frames=4, max_frames=12, use_token_compression=True,
)  # fmt: skip
FILES = {"preprocessor_config.json": IMAGES, "video_preprocessor_config.json": VIDEOS}


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 256 bytes and the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = TEMPLATE
    return made


def build(ids: dict[str, int], hidden: int, layers: int) -> Any:
    """Build the model with Hugging Face's class. The target and the draft must have the same vision settings."""
    text = dict(
        model_type="qwen2", vocab_size=264, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=ids[END],
        pad_token_id=ids[PAD], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        model_type="video_llama_3_vision", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        patch_size=14,
    )  # fmt: skip
    places = {"image_token_id": ids[IMAGE], "video_token_id": ids[VIDEO]}
    return VideoLlama3ForConditionalGeneration(VideoLlama3Config(text_config=text, vision_config=vision, **places))


def randomize(hf: Any, seed: int) -> None:
    """Give every weight random values: biases of 0 and norms of 1 would hide faults in them."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in hf.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.data = 0.2 * noise + ("norm" in name and name.endswith("weight"))
        else:
            weight.data = noise if "embed_tokens" in name else noise / weight[0].numel() ** 0.5


def write(folder: Path, hidden: int, layers: int, seed: int) -> None:
    """Write a checkpoint: weights, tokenizer with chat template, generation config, settings of both processors."""
    words = tokenizer()
    hf = build({token: words.convert_tokens_to_ids(token) for token in SPECIAL}, hidden, layers)
    randomize(hf, seed)
    hf.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    hf.save_pretrained(folder)
    words.save_pretrained(folder)
    for name, settings in FILES.items():
        (folder / name).write_text(json.dumps(settings, indent=2))


def main(folder: str) -> None:
    write(Path(folder, "target"), hidden=64, layers=3, seed=1)
    write(Path(folder, "draft"), hidden=32, layers=2, seed=2)


if __name__ == "__main__":
    main(sys.argv[1])
