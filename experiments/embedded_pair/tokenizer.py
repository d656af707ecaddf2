"""The word-level tokenizer, the chat templates, and the token layout that training rows share with them."""

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from specvlm.video.synthetic import SPECIAL_TOKENS, SYSTEM, VOCABULARY

VOCAB_SIZE = 192  # rows of the embedding; the tokenizer uses fewer, as released checkpoints do
STAMP_WORDS = ["<", ">", "seconds", *"0123456789"]  # Qwen3-VL's timestamps; unknown words to the other families
ID = {word: i for i, word in enumerate([*VOCABULARY, *STAMP_WORDS])}
PAD, END, START = ID["<|endoftext|>"], ID["<|im_end|>"], ID["<|im_start|>"]
FAMILIES = ("qwen2_5_vl", "llava_onevision", "qwen3_vl")
QWEN = ("qwen2_5_vl", "qwen3_vl")  # one vision token holds two frames
VIDEO = {"qwen2_5_vl": "<|video_pad|>", "llava_onevision": "<video>", "qwen3_vl": "<|video_pad|>"}
IMAGE = {"qwen2_5_vl": "<|image_pad|>", "llava_onevision": "<image>", "qwen3_vl": "<|image_pad|>"}
_VISION = "<|vision_start|>", "<|vision_end|>"
_WRAP = {"qwen2_5_vl": _VISION, "llava_onevision": ("", ""), "qwen3_vl": _VISION}


def encode(text: str) -> list[int]:
    """Ids of a text of known words separated by single spaces; equal to the tokenizer's and much faster."""
    return [ID[word] for word in text.split()]


def before_video(family: str) -> list[int]:
    """Everything in front of the video."""
    return encode(f"<|im_start|> system {SYSTEM} <|im_end|> <|im_start|> user {_WRAP[family][0]}")


def before_frame(second: int) -> list[int]:
    """Qwen3-VL's text before the token rows of a second: their mean time, and a vision tag inside the template's own."""
    stamp = " ".join(f"{second + 0.25:.1f}")  # of two frames, at second and second + 0.5
    return encode(f"< {stamp} seconds > {_VISION[0]}")


def after_frame() -> list[int]:
    """Qwen3-VL's text after the token rows of a second."""
    return encode(_VISION[1])


def first_question(family: str, question: str) -> list[int]:
    """Everything between the last video token and the first answer token."""
    last = after_frame() if family == "qwen3_vl" else []
    return last + encode(f"{_WRAP[family][1]} {question} <|im_end|> <|im_start|> assistant")


def next_question(question: str) -> list[int]:
    """The later turns of a conversation."""
    return encode(f"<|im_start|> user {question} <|im_end|> <|im_start|> assistant")


def chat_template(family: str) -> str:
    """The family's message form: a content list of text, video and image entries, kept in the order given."""
    opening, closing = _WRAP[family]
    video, image = (f"{opening}{name[family]}{closing}" for name in (VIDEO, IMAGE))
    return (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'video' %}" + video + "{% elif part['type'] == 'image' %}" + image + ""
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Lower-cases, splits punctuation (and digits), maps other words to <unk>, decodes without blanks before punctuation."""
    stamps = family == "qwen3_vl"
    words = ID if stamps else {word: ID[word] for word in VOCABULARY}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    splits += [pre_tokenizers.Digits(individual_digits=True)] if stamps else []
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words by blanks, none before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t != "<unk>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=chat_template(family),
    )
