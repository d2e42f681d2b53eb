"""Question sets as text: how a record becomes a question, an answer and its rationale.

The sets and formats are those of "Is C4 Dataset Optimal for Pruning?" (Bandari et al., EMNLP 2024,
arXiv 2410.07461), written anew. Every item is two lines, `Question: ...` and `Answer: ...`:

zero-shot          the question; the answer is left to the model
single             one question with its answer
in-context         questions with answers, joined until they are longer than the prompt, of which
                   the prompt is a random window
chain-of-thought   the same, with the rationale before the answer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipcal.errors import ConfigError, Unavailable

Format = Literal["zero-shot", "single", "in-context", "chain-of-thought"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT_FORMAT: Format = "in-context"
JOINED_FORMATS: tuple[Format, ...] = ("in-context", "chain-of-thought")
SEPARATOR = "\n\n"  # between joined items
LABEL_PHRASE = "The answer is"  # introduces the label after a rationale
NLI_LABELS = ("entailment", "neutral", "contradiction")  # by the number that SNLI and ANLI give them
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks for a calculator, no text


@dataclass(frozen=True)
class Item:
    """One question of a set, each part in one line."""

    question: str
    answer: str
    rationale: str | None = None

    def text(self, format: Format) -> str:
        """The item in the template; formats that join items differ only in the rationale."""
        asked = f"Question: {self.question}\nAnswer:"
        if format == "zero-shot":
            return asked
        if format == "chain-of-thought":
            return f"{asked} {self.rationale} {LABEL_PHRASE} {self.answer}."
        return f"{asked} {self.answer}"


@dataclass(frozen=True)
class QuestionSet:
    """How the records of one data set are read.

    columns:   of each part, the columns it may stand in: the hub's name for it, then others.
    read:      takes the parts by name, returns the item. May raise ValueError.
    rationale: the part that holds it, for sets that have one; needed for chain-of-thought alone.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    read: Callable[[dict[str, Any]], Item]
    rationale: str | None = None

    def item(self, record: dict[str, Any], format: Format) -> Item:
        """Read a record of the hub's set or of a local copy.

        Raises Unavailable when a field that `format` needs is missing, or says nothing usable.
        """
        parts = {}
        for part, columns in self.columns.items():
            found = [column for column in columns if record.get(column) is not None]
            if not found and (part != self.rationale or format == "chain-of-thought"):
                wanted = " or ".join(map(repr, columns))
                raise Unavailable(
                    f"question set {self.name!r}: a record has no field {wanted} (columns: "
                    f"{', '.join(sorted(record)) or 'none'}); pass records of this set, or plain text as "
                    "NAME=PATH"
                )
            parts[part] = record[found[0]] if found else None
        try:
            return self.read(parts)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise Unavailable(
                f"question set {self.name!r}: a record cannot be read ({reason}); its fields were "
                f"{', '.join(f'{part} {str(value)[:40]!r}' for part, value in parts.items())}"
            ) from error

    def check(self, format: Format) -> None:
        """Raise ConfigError when chain-of-thought is asked of a set without rationales."""
        if format == "chain-of-thought" and self.rationale is None:
            able = ", ".join(sorted(name for name, other in QUESTION_SETS.items() if other.rationale))
            raise ConfigError(
                f"question set {self.name!r} has no rationales for chain-of-thought; those with them: "
                f"{able}. Take one of these, or {self.name}:in-context"
            )


def format_named(name: str, label: str) -> Format:
    """The format of that name. Raises ConfigError with the known ones; `label` is what was typed."""
    for known in FORMATS:
        if known == name:
            return known
    raise ConfigError(f"corpus {label!r}: {name!r} is no format; known: {', '.join(FORMATS)}")


def _line(value: Any) -> str:
    """A text in one line. Raises ValueError for what is no text, or empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, got {value!r}")
    return " ".join(value.split())


def _number(value: Any) -> str:
    """`17.0` and `"17.0"` as `17`; an answer that is no number, such as `1/3`, as it stands."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _line(value)
    return str(int(number)) if number.is_integer() else f"{number:.10g}"


def _with_choices(question: str, choices: Sequence[Any], index: int) -> Item:
    """A question with lettered choices; the answer is the letter and the choice."""
    texts = [_line(choice["text"] if isinstance(choice, dict) else choice) for choice in choices]
    if not 0 <= index < len(texts):
        raise ValueError(f"the answer's number {index} is not among {len(texts)} choices")
    lettered = [f"({letter}) {text}" for letter, text in zip("ABCDEFGHIJ", texts, strict=False)]
    return Item(f"{question} {' '.join(lettered)}", lettered[index])


def _index(key: Any) -> int:
    """0-based place of a choice, from a letter or from such a number."""
    return "ABCDEFGHIJ".index(_line(key)) if isinstance(key, str) else int(key)


def _word_problem(parts: dict[str, Any]) -> Item:
    body = [_line(parts["body"])] if "body" in parts else []
    return Item(" ".join([*body, _line(parts["question"])]), _number(parts["answer"]))


def _gsm8k(parts: dict[str, Any]) -> Item:
    """The answer holds the steps, then `####` and the number."""
    steps, mark, label = _CALCULATOR.sub("", parts["answer"]).rpartition("####")
    if not mark:
        raise ValueError("the answer has no '####' before its number")
    return Item(_line(parts["question"]), _line(label), _line(steps))


def _inference(parts: dict[str, Any]) -> Item:
    label, rationale = parts["label"], parts.get("explanation")
    if not isinstance(label, str):
        if not 0 <= int(label) < len(NLI_LABELS):
            raise ValueError(f"the label {label} is none of 0, 1, 2")
        label = NLI_LABELS[int(label)]
    if label not in NLI_LABELS:
        raise ValueError(f"the label {label!r} is none of {', '.join(NLI_LABELS)}")
    question = f"Premise: {_line(parts['premise'])} Hypothesis: {_line(parts['hypothesis'])}"
    return Item(question, label, None if rationale is None else _line(rationale))


def _commonsenseqa(parts: dict[str, Any]) -> Item:
    choices = parts["choices"]
    texts = choices["text"] if isinstance(choices, dict) else choices
    return _with_choices(_line(parts["question"]), texts, _index(parts["answer"]))


def _race(parts: dict[str, Any]) -> Item:
    question = f"{_line(parts['article'])} {_line(parts['question'])}"
    return _with_choices(question, parts["options"], _index(parts["answer"]))


def _winogrande(parts: dict[str, Any]) -> Item:
    """The answer is 1 or 2, as a number or a text."""
    options = [parts["option1"], parts["option2"]]
    return _with_choices(_line(parts["sentence"]), options, int(parts["answer"]) - 1)


def _strategyqa(parts: dict[str, Any]) -> Item:
    facts = parts["facts"]
    if not isinstance(parts["answer"], bool):
        raise ValueError(f"the answer {parts['answer']!r} is neither true nor false")
    known = None if facts is None else _line(facts if isinstance(facts, str) else " ".join(facts))
    return Item(_line(parts["question"]), "yes" if parts["answer"] else "no", known)


_PREMISE = {
    "premise": ("premise", "Sentence1"),
    "hypothesis": ("hypothesis", "Sentence2"),
    "label": ("label", "gold_label"),
}

QUESTION_SETS = {
    questions.name: questions
    for questions in (
        QuestionSet(
            "gsm8k",
            {"question": ("question",), "answer": ("answer",), "steps": ("answer",)},
            _gsm8k,
            "steps",
        ),
        QuestionSet(
            "svamp",
            {"body": ("Body", "body"), "question": ("Question", "question"), "answer": ("Answer", "answer")},
            _word_problem,
        ),
        QuestionSet("mawps", {"question": ("question",), "answer": ("result", "answer")}, _word_problem),
        QuestionSet(
            "esnli",
            {**_PREMISE, "explanation": ("explanation_1", "explanation", "Explanation_1")},
            _inference,
            "explanation",
        ),
        QuestionSet("anli_r1", _PREMISE, _inference),
        QuestionSet("anli_r3", _PREMISE, _inference),
        QuestionSet(
            "commonsenseqa",
            {"question": ("question",), "choices": ("choices",), "answer": ("answerKey", "answer")},
            _commonsenseqa,
        ),
        QuestionSet(
            "race",
            {
                "article": ("article",),
                "question": ("question",),
                "options": ("options",),
                "answer": ("answer",),
            },
            _race,
        ),
        QuestionSet(
            "winogrande",
            {
                "sentence": ("sentence",),
                "option1": ("option1",),
                "option2": ("option2",),
                "answer": ("answer",),
            },
            _winogrande,
        ),
        QuestionSet(
            "strategyqa",
            {"question": ("question",), "answer": ("answer",), "facts": ("facts",)},
            _strategyqa,
            "facts",
        ),
    )
}
