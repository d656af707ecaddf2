"""Scoring rules of published scripts for multiple choice, reimplemented from the scripts named in SOURCES.

Each rule gives 1 for a right answer and 0 for a wrong one, or None if the script leaves the answer out of its mean.
Rules keep the quirks of their scripts, so that scores compare with published ones. They need `Answer.letter`.
"""

import re
from collections.abc import Callable, Sequence

from specvlm.strategies.metric import Answer

Rule = Callable[[Answer], float | None]

PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
# Video-MME's script lacks two commas, which join its other four prefixes into these two.
VIDEO_MME_PREFIXES = (*PREFIXES, "The best option isThe correct option is", "Best answer:Best option:")
OTHER_PREFIXES = (*PREFIXES, "The best option is", "The correct option is", "Best answer:", "Best option:")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def mvbench(answer: Answer) -> float:
    """MVBench: right if the first word contains the right letter as "(a)", or if "(a)" contains the word.

    The script has the model continue from "Best option:(", so every first word begins with "(". Case is ignored, and
    the second test also ignores dots. So "A." is right, and so is an empty answer, whose word is "(".
    """
    right = f"({_last_letter(answer)})".lower()
    line = "(" + answer.text.strip().removeprefix("(").strip().split("\n")[0]
    word = line.lower().split(" ")[0]
    return float(word.replace(".", "") in right or right in word)


def mlvu(answer: Answer) -> float:
    """MLVU: the text before the first ")" is the letter. The script has the model continue from "Best option:("."""
    text = answer.text.strip().removeprefix("(").strip()
    return float(text.partition(")")[0] == _last_letter(answer))


def video_mme(answer: Answer) -> float | None:
    """Video-MME: the first capital A to D once VIDEO_MME_PREFIXES are removed; None if there is none."""
    found = _first_capital(answer.text, "ABCD", VIDEO_MME_PREFIXES)
    return None if found is None else float(found == answer.letter)


def video_mme_all(answer: Answer) -> float:
    """lmms-eval's rule for Video-MME and MLVU: `video_mme`, but an answer without a letter is wrong."""
    return video_mme(answer) or 0.0


def long_video_bench(answer: Answer) -> float:
    """LongVideoBench: the first capital A to E once OTHER_PREFIXES are removed.

    For an answer without one, the script picks an option at random. Here it gets the expected score of that pick.
    """
    found = _first_capital(answer.text, "ABCDE", OTHER_PREFIXES)
    return 1 / len(answer.options) if found is None else float(found == answer.letter)


def mvbench_lmms_eval(answer: Answer) -> float | None:
    """lmms-eval's rule for MVBench: "B. text", else the first single letter A to E in either case.

    Even the article "a" counts. An empty answer is not counted.
    """
    if not answer.text:
        return None
    text = answer.text.strip()
    if opened := re.match(r"([A-E])\.\s*.+$", text, re.I):
        return float(opened[1].upper() == answer.letter)
    alone = re.search(r"\b([A-E])\b", _without_punctuation(re.sub(r"[\n\t]", " ", text).strip()), re.I)
    return float(alone is not None and alone[1].upper() == answer.letter)


def choice(answer: Answer) -> float:
    """Our own rule, for other data sets: a letter at the start, a letter after "answer", or the text of one option.

    "B", "(B)", "B. text", "B) text", "The answer is (B)." and "text" all choose option B. Anything else is wrong, such
    as "A dog runs" and an answer with the texts of two options.
    """
    text = answer.text.strip()
    for pattern in (r"\(([A-Z])\)", r"([A-Z])(?:[.:)]|$)", r".*?\b(?:[Aa]nswer|[Oo]ption)\b(?: is)?:? *\(?([A-Z])\b"):
        found = re.match(pattern, text, re.S)
        if found and found[1] in answer.letters:
            return float(found[1] == answer.letter)
    return float(_named(text, answer.options) == {answer.reference})


def _named(text: str, options: Sequence[str]) -> set[str]:
    """Options whose text occurs in the answer as whole words. Of "red" and "dark red", only the longer one counts."""
    rest, found = text.casefold(), set[str]()
    for option in sorted(set(options), key=len, reverse=True):
        words = option.strip().rstrip(".").casefold()
        pattern = rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])"
        if words and re.search(pattern, rest):
            found.add(option)
            rest = re.sub(pattern, "\n", rest)
    return found


def _last_letter(answer: Answer) -> str:
    """Letter of the right option; of equal options, the last counts, as in the scripts of MVBench and MLVU."""
    pairs = zip(answer.options, answer.letters, strict=False)
    return [letter for option, letter in pairs if option == answer.reference][-1]


def _first_capital(text: str, letters: str, prefixes: Sequence[str]) -> str | None:
    """Remove each prefix everywhere, in this order, and find the first of these letters; None if there is none."""
    for prefix in prefixes:
        text = text.replace(prefix, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else None


def _without_punctuation(text: str) -> str:
    """Remove punctuation as VQA's evaluation does.

    A mark that stands next to a space anywhere in the text is removed throughout. So are all marks if the text has a
    comma between digits. Other marks become spaces. Dots are removed, except before a digit.
    """
    grouped = re.search(r"\d,\d", text) is not None
    told = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        told = told.replace(mark, "" if beside or grouped else " ")
    return re.sub(r"\.(?!\d)", "", told, count=32)  # the script passes a flag, 32, as the count


# By the name of the data set.
PUBLISHED: dict[str, Rule] = {
    "mvbench": mvbench,
    "mlvu": mlvu,
    "video_mme": video_mme,
    "long_video_bench": long_video_bench,
}
LMMS_EVAL: dict[str, Rule] = {
    "mvbench": mvbench_lmms_eval,
    "mlvu": video_mme_all,
    "video_mme": video_mme_all,
    "long_video_bench": long_video_bench,
}
SOURCES: dict[Rule, str] = {
    mvbench: "OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb at 4631cd62, check_ans",
    mlvu: "JUNJIE99/MLVU, videochat2/choice_bench.py at 0b16f40f, check_ans",
    video_mme: "BradyFU/Video-MME, evaluation/eval_your_results.py at 4e7566d3, extract_characters_regex",
    long_video_bench: "lmms-eval, lmms_eval/tasks/longvideobench/utils.py at 03a5823f, parse_multi_choice_response",
    mvbench_lmms_eval: "lmms-eval, lmms_eval/tasks/mvbench/utils.py at 1ab9504d, mcq_acc",
    video_mme_all: "lmms-eval, lmms_eval/tasks/videomme/utils.py at 06965734 and mlvu/utils.py at 025f0168",
    choice: "specvlm",
}
