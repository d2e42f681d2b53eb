"""FreebaseQA: factoid questions, right when the answer is one of the aliases (Jiang et al., NAACL 2019)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcal.configs.sweep import QuestionSettings
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.errors import Unavailable
from skipcal.evaluation.statistics import Scale
from skipcal.evaluation.tasks.answers import Subject, answers, check_prompts
from skipcal.evaluation.tasks.task import Metrics, Record, answered, drawn, in_subsets, text_quality
from skipcal.evaluation.tasks.text_metrics import contains_answer, exact_match
from skipcal.text.corpora import file_sha256
from skipcal.text.local_files import ending, open_text
from skipcal.text.question_sets import read_records, text_field, unique

# The paper does not give its prompt; this one is ours.
PROMPT = "Answer the question with a name, a number or a few words.\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A question and every answer that counts as right."""

    text: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class FreebaseQA:
    """Factoid questions by id."""

    questions: dict[str, Question]
    new_tokens: int
    warm_up_tokens: int
    source: dict[str, Any]
    name: str = "freebaseqa"

    @property
    def scales(self) -> Mapping[str, Scale]:
        """All metrics are means."""
        return {}

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the questions."""
        return list(self.questions)

    def subset(self, key: str) -> str | None:
        """There are none."""
        return None

    def header(self) -> dict[str, Any]:
        """The file, the prompt and the length."""
        return {**self.source, "prompt": PROMPT, "new_tokens": self.new_tokens}

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """One record a question."""
        prompts = {key: _prompt(self.questions[key], subject) for key in ids}
        for group, report in answers(
            subject, policy, prompts, new_tokens=self.new_tokens, batch_size=batch_size
        ):
            yield [answered(answer) for answer in group], report

    def metrics(self, record: Record, full: Record) -> Metrics:
        """Exact match over the aliases; beside it whether an alias stands anywhere in the answer."""
        aliases = self.questions[record["id"]].aliases
        right = {
            "exact_match": float(exact_match(record["text"], aliases)),
            "contains_answer": float(contains_answer(record["text"], aliases)),
        }
        return in_subsets({**right, **text_quality(record, full)})


def load_freebaseqa(settings: QuestionSettings, subject: Subject, seed: int) -> FreebaseQA:
    """Read and draw the questions.

    Raises Unavailable for a file that cannot be used, ConfigError for questions that do not fit the model.
    """
    if settings.data_file is None:
        raise Unavailable(
            "FreebaseQA is not on the hub; get FreebaseQA-eval.json from github.com/kelvin-jiang/FreebaseQA "
            "and pass it with --data-files freebaseqa=PATH"
        )
    path = Path(settings.data_file)
    questions = drawn(read_questions(path), settings.items, seed, str(path))
    prompts = {key: _prompt(question, subject) for key, question in questions.items()}
    check_prompts(subject, prompts, settings.new_tokens)
    return FreebaseQA(
        questions=questions,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={"file": path.name, "sha256": file_sha256(path), "items": settings.items, "seed": seed},
    )


def _prompt(question: Question, subject: Subject) -> list[int]:
    return subject.encode([{"role": "user", "content": PROMPT.format(question=question.text)}])


def read_questions(path: Path) -> dict[str, Question]:
    """Questions by id, of the release's JSON or of .jsonl with id, question and answers.

    Raises Unavailable for a missing question, aliases that are missing or empty, a repeated id.
    """
    records = _release(path) if ending(path) == ".json" else read_records(path)
    questions: dict[str, Question] = {}
    for where, record in records:
        text = text_field(record, "question", where)
        key = unique(questions, str(record.get("id", where.rpartition(":")[2])), where)
        aliases = record.get("answers")
        if not isinstance(aliases, list) or not aliases:
            raise Unavailable(f"{where}: question {key!r} has no answers; expected a list in field 'answers'")
        if not all(isinstance(alias, str) and alias.strip() for alias in aliases):
            raise Unavailable(f"{where}: question {key!r} has an empty answer; expected text")
        questions[key] = Question(text=text, aliases=tuple(aliases))
    if not questions:
        raise Unavailable(f"{path} holds no question")
    return questions


def _release(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The release's form: Questions[].Parses[].Answers[].AnswersName[]."""
    try:
        with open_text(path) as file:
            entries = json.load(file)["Questions"]
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"{path} is not the release of FreebaseQA: expected JSON with 'Questions'"
        ) from error
    for number, entry in enumerate(entries):
        where = f"{path}, question {number}"
        try:
            names = [
                name
                for parse in entry["Parses"]
                for answer in parse["Answers"]
                for name in answer["AnswersName"]
                if name
            ]
            yield (
                where,
                {
                    "id": entry.get("Question-ID", f"question-{number}"),
                    "question": entry["RawQuestion"],
                    "answers": list(dict.fromkeys(names)),
                },
            )
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{where}: field {error} is missing or of another kind") from error
