"""The word-level tokenizer, the chat templates, and the token layout that training rows share with them."""

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from specvlm.video.synthetic import SPECIAL_TOKENS, SYSTEM, VOCABULARY

VOCAB_SIZE = 192  # rows of the embedding; the tokenizer uses fewer, as released checkpoints do
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, END, START = ID["<|endoftext|>"], ID["<|im_end|>"], ID["<|im_start|>"]
FAMILIES = ("qwen2_5_vl", "llava_onevision")
VIDEO = {"qwen2_5_vl": "<|video_pad|>", "llava_onevision": "<video>"}
IMAGE = {"qwen2_5_vl": "<|image_pad|>", "llava_onevision": "<image>"}
_WRAP = {"qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"), "llava_onevision": ("", "")}


def encode(text: str) -> list[int]:
    """Ids of a text of known words separated by single spaces; equal to the tokenizer's and much faster."""
    return [ID[word] for word in text.split()]


def before_video(family: str) -> list[int]:
    """Everything in front of the first video token."""
    return encode(f"<|im_start|> system {SYSTEM} <|im_end|> <|im_start|> user {_WRAP[family][0]}")


def first_question(family: str, question: str) -> list[int]:
    """Everything between the last video token and the first answer token."""
    return encode(f"{_WRAP[family][1]} {question} <|im_end|> <|im_start|> assistant")


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
    """Lower-cases, splits punctuation, maps other words to <unk>, and decodes without blanks before punctuation."""
    core = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
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
