"""Make scoring.json: answers of many kinds, and what the scoring scripts of four data sets say of them.

    python tests/data/make_scoring.py

The rules are written here a second time, from reading the scripts and without looking at specvlm's own code, so that a
slip in one shows as a difference. When the table was made, the scripts' own functions were run on the same answers, in
a scratch folder; all results were equal. The scripts (repository, file, commit):

    mvbench            OpenGVLab/Ask-Anything   video_chat2/mvbench.ipynb               4631cd62  check_ans
    mlvu               JUNJIE99/MLVU            videochat2/choice_bench.py              0b16f40f  check_ans
    video_mme          BradyFU/Video-MME        evaluation/eval_your_results.py         4e7566d3  extract_characters_regex
    long_video_bench   EvolvingLMMs-Lab/lmms-eval   tasks/longvideobench/utils.py       03a5823f  (its publisher has no script)
    lmms_eval          EvolvingLMMs-Lab/lmms-eval   tasks/{mvbench,mlvu,videomme}/utils.py  1ab9504d, 025f0168, 06965734

A score is 1, 0, null (the script leaves the answer out) or, where the script draws an option, the mean over all draws.
"""

import json
import re
from itertools import product
from pathlib import Path

QUESTIONS = (
    (("Red", "Blue", "Green", "Dark yellow"), 1),
    (("A dog runs.", "Both dogs sleep.", "Cats eat.", "Dogs bark, then eat."), 0),
    (("before the door opens", "after the door opens", "it is not shown"), 2),
    (("1", "2", "3", "4"), 3),
    (("Yes", "No"), 0),
    (("in the car", "on a bus", "by train", "on foot", "Every one of these"), 4),
)
# R: the right letter, W: a wrong one; {R} and {W} are replaced by the letter, {right} and {wrong} by the options' texts.
FORMS = """{R}|{W}|({R})|({W})|{R}.|{W}.|{R})|{W})|{R}:|{R},|{R} |  {R}|[{R}]|<{R}>|"{R}"|**{R}**|{R}!|{R}?|#{R}|{R}/{W}
{r}|{w}|({r})|{r}.
{R}. {right}|{W}. {wrong}|({R}) {right}|({W}) {wrong}|{R}) {right}|{R}: {right}|{R} {right}|{R} - {right}
{r}. {right}|( {R} ) {right}
{right}|{wrong}|{right} and {wrong}|It shows {right}.|it is {right}|({right})
The answer is {R}|The answer is {W}|The answer is {R}.|The answer is ({R}).|The best answer is {R}
The correct answer is: {R}
The best option is {R}|The correct option is ({W})|Best answer: {R}|Best option: {R}|Best option:({R})
Best answer:Best option: {R}
Answer: {R}|Answer: {W}|answer: {R}|Option {R}|option {r}|The answer, I think, is {R}
The answer is the answer {R}|My choice is {R}
{R} because the video shows {right}|I would choose {R}, not {W}|{R} or {W}|{W} or {R}|{R} and {W}
Not {W}, but {R}|{R}{W}|{R}{R}
{R}\\nThe video shows {right}.|{R}.\\n{W}.|\\n{R}|\\n\\n({R}) {right}|({R})\\n({W})|{R}\\t{right}
Let me see.\\n{R}|  ({R})\\n
I am sorry, but I cannot answer this.|I cannot see a video.|i can not tell|no idea|Unknown|None|none|N/A
Cannot be determined|Sorry.
None of the above|All of the above|Definitely something else|Every option|E|F|G|Z|e|f|@|1|2.|0.5|3,000|1,2,3 {R}
7.{R}
the person in the video walks to the left and then slowly opens the door|a person walks|I see a dog
as i said, b it is
The person in the video walks to the left and then slowly opens the big door|Because it rains|Dunno
||   |\\n|.|...|(|)|()|( )|)(|,|?|-|…|是{R}|答案是{R}。|{R}、{right}|Ｂ|réponse {R}|{{"answer": "{R}"}}
\\\\boxed{{{R}}}|<answer>{R}</answer>"""


def main() -> None:
    """Write the table: for each data set rows of question, answer and scores."""
    found = {"questions": [[list(options), options[right]] for options, right in QUESTIONS], "answers": {}}
    for name, (ours, theirs, most) in RULES.items():
        rows = []
        for (number, (options, right)), form in product(enumerate(QUESTIONS), forms()):
            if len(options) <= most:
                text = filled(form, options, right)
                rows.append([number, text, ours(text, options, right), theirs(text, options, right)])
        found["answers"][name] = sorted({json.dumps(row): row for row in rows}.values(), key=lambda row: (row[0], row[1]))
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in found["answers"].items()
    ]
    text = f'{{"questions": {json.dumps(found["questions"])},\n"answers": {{\n' + ",\n".join(lines) + "\n}}\n"
    Path(__file__).with_name("scoring.json").write_text(text, encoding="utf-8")
    print({name: len(rows) for name, rows in found["answers"].items()})


def forms() -> list[str]:
    return [
        form.replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")
        for line in FORMS.split("\n")
        for form in line.split("|")
    ]


def filled(form: str, options: tuple[str, ...], right: int) -> str:
    wrong = (right + 1) % len(options)
    names = {"R": chr(65 + right), "W": chr(65 + wrong), "r": chr(97 + right), "w": chr(97 + wrong)}
    return form.format(**names, right=options[right], wrong=options[wrong])


# ---- the rules -------------------------------------------------------------------------------------------------------


def mvbench(text: str, options: tuple[str, ...], right: int) -> float:
    # The model continues "Best option:(". The script keeps the first line and puts the "(" back.
    continued = text.strip()
    if continued[:1] == "(":
        continued = continued[1:].strip()
    predicted = ("(" + continued.split("\n")[0]).lower()
    truth = f"({'abcdefg'[right]})"
    first = predicted[: predicted.index(" ")] if " " in predicted else predicted
    if first.replace(".", "") in truth:
        return 1.0
    return 1.0 if truth in first else 0.0


def mlvu(text: str, options: tuple[str, ...], right: int) -> float:
    continued = text.strip()
    if continued[:1] == "(":
        continued = continued[1:].strip()
    if ")" in continued:
        continued = continued[: continued.index(")")]
    return 1.0 if continued == "ABCDEFG"[right] else 0.0


def capital(text: str, letters: str, prefixes: list[str]) -> str:
    """Letter that the scripts of Video-MME, MLVU in lmms-eval and LongVideoBench find; empty if there is none."""
    left = text.strip()
    for prefix in prefixes:
        left = "".join(left.split(prefix))
    return next((sign for sign in left if sign in letters), "")


JOINED = ["The best answer is", "The correct answer is", "The answer is", "The answer",
          "The best option is" + "The correct option is", "Best answer:" + "Best option:"]  # fmt: skip
SPLIT = ["The best answer is", "The correct answer is", "The answer is", "The answer",
         "The best option is", "The correct option is", "Best answer:", "Best option:"]  # fmt: skip


def video_mme(text: str, options: tuple[str, ...], right: int) -> float | None:
    letter = capital(text, "ABCD", JOINED)
    return None if letter == "" else float(letter == "ABCD"[right])


def video_mme_lmms(text: str, options: tuple[str, ...], right: int) -> float:
    return float(capital(text, "ABCD", JOINED) == "ABCD"[right])


def long_video_bench(text: str, options: tuple[str, ...], right: int) -> float:
    letter = capital(text, "ABCDE", SPLIT)
    draws = [letter] if letter else list("ABCDE"[: len(options)])
    return sum(draw == "ABCDE"[right] for draw in draws) / len(draws)


def mvbench_lmms(text: str, options: tuple[str, ...], right: int) -> float | None:
    if text == "":  # not counted when the mean is taken
        return None
    opened = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE).match(text.strip())
    if opened:
        return float(opened.group(1).upper() == "ABCDE"[right])
    line = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = line
    for sign in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]:
        vanishes = sign + " " in line or " " + sign in line or re.search(r"\d,\d", line)
        cleaned = cleaned.replace(sign, "" if vanishes else " ")
    dots = 0
    kept = ""
    for place, sign in enumerate(cleaned):
        if sign == "." and dots < 32 and not cleaned[place + 1 : place + 2].isdigit():
            dots += 1
        else:
            kept += sign
    for marks in ("'", '"', ")", "("):
        kept = kept.strip(marks)
    words = re.findall(r"\w+", kept.strip().lower())
    letter = next((word for word in words if word in "abcde" and len(word) == 1), None)
    return float(letter == "abcde"[right])


# By data set: the publisher's rule, lmms-eval's, and the most options that a question of the set has.
RULES = {
    "mvbench": (mvbench, mvbench_lmms, 5),
    "mlvu": (mlvu, video_mme_lmms, 4),
    "video_mme": (video_mme, video_mme_lmms, 4),
    "long_video_bench": (long_video_bench, long_video_bench, 5),
}

if __name__ == "__main__":
    main()
