"""FreebaseQA: factoid questions, right when the answer is one of the aliases (Jiang et al., NAACL 2019)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from skipcal.configs.sweep import QuestionSettings
from skipcal.errors import Unavailable
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.task import AnsweredTask, Metrics, Record, drawn, in_subsets, text_quality
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


class FreebaseQA(AnsweredTask[Question]):
    """Factoid questions by id."""

    name = "freebaseqa"
    asked: ClassVar[Mapping[str, str]] = {"prompt": PROMPT}

    def prompt(self, item: Question, subject: Subject) -> list[int]:
        """The question, as a user asks it."""
        return subject.encode([{"role": "user", "content": PROMPT.format(question=item.text)}])

    def metrics(self, record: Record, full: Record) -> Metrics:
        """Exact match over the aliases; beside it whether an alias stands anywhere in the answer."""
        aliases = self.items[record["id"]].aliases
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
    task = FreebaseQA(
        items=questions,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={"file": path.name, "sha256": file_sha256(path), "items": settings.items, "seed": seed},
    )
    task.check_prompts(subject)
    return task


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
