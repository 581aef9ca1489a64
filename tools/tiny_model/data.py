"""What the model is taught, and what it is asked afterwards: all from our own templates and word lists.

A document is a list of turns. A turn is (role, text); role None is raw text without the chat frame. The model learns to
write what it is to say itself (`SPOKEN` roles), not what others say.

Training and examination use other phrasings (phrases.py) of the same facts (countries.py): a fact that was never taught
can't be known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from countries import COUNTRIES, Country
from phrases import (
    ASKS_HELD_OUT,
    ASKS_TRAIN,
    CAPITAL_HELD_OUT,
    CAPITAL_TRAIN,
    CLOSERS_HELD_OUT,
    CLOSERS_TRAIN,
    CONTINUE_HELD_OUT,
    CONTINUE_TRAIN,
    COUNTRY_HELD_OUT,
    COUNTRY_TRAIN,
    GREETED,
    GREETINGS,
    HELLO,
    OPENERS_HELD_OUT,
    OPENERS_TRAIN,
    QUALITIES,
    SALAD,
    SYSTEM_HELD_OUT,
    SYSTEM_TRAIN,
    TALK_HELD_OUT,
    TALK_TRAIN,
    TELL_ABOUT_HELD_OUT,
    TELL_ABOUT_TRAIN,
    TELL_TRAIN,
    THINGS_HELD_OUT,
    THINGS_TRAIN,
    UNKNOWN,
    WHAT_FOR,
    WHO,
    WHO_BEFORE,
    WHO_CORES,
    WHO_ELSE,
)
from stories import KINDS, NAMES, story

__all__ = ["SPOKEN", "Document", "Question", "documents", "held_out", "held_out_stories", "plain"]

Document = list[tuple[str | None, str]]
SPOKEN = ("assistant", "continuation")


@dataclass(frozen=True)
class Question:
    """A chat to put to the model, and the one right answer."""

    skill: str
    messages: tuple[tuple[str, str], ...]
    answer: str


def plain(text: str) -> str:
    """`text` as a question begins: with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _first_person(text: str) -> str:
    return re.sub(r"\bi\b(?!')", "I", text)


def _salad(rng: random.Random, n_most: int) -> str:
    """A few words without sense: what stands around a question must not change its answer."""
    return " ".join(rng.choices(SALAD, k=rng.randint(1, n_most)))


def _around(rng: random.Random, phrases: list[str], teaching: bool) -> str:
    """A phrase to stand before or after a question, often none."""
    if rng.random() < 0.5:
        return ""
    if teaching and rng.random() < 0.25:
        return plain(_salad(rng, 8)) + rng.choice([".", ".", "!", ":", ","])
    who, what, m = rng.choice(WHO_ELSE), rng.choice(WHAT_FOR), rng.randrange(100)
    return rng.choice(phrases).format(who=who, what=what, m=m, b=rng.choice(THINGS_TRAIN))


def _framed(rng: random.Random, core: str, *, teaching: bool) -> str:
    """The question `core` as somebody puts it, with other words around it."""
    opener = _around(rng, OPENERS_TRAIN if teaching else OPENERS_HELD_OUT, teaching)
    closer = _around(rng, CLOSERS_TRAIN if teaching else CLOSERS_HELD_OUT, teaching)
    core = _first_person(core)
    if not opener or opener[-1] in ".!" or rng.random() < 0.3:
        core = plain(core)
    if closer and core[-1] not in "?.!":
        core += "?"
    return " ".join(part for part in (opener, core, closer) if part)


def _worn(rng: random.Random, core: str) -> str:
    """`core` with some of its small words lost and others added, as hasty people write; what matters stays."""
    if rng.random() > 0.2:
        return core
    words = []
    for word in core.split(" "):
        if "{" in word or "capital" in word or "country" in word or rng.random() > 0.15:
            words.append(word)
        if rng.random() < 0.08:
            words.append(rng.choice(SALAD))
    return " ".join(words)


def _noisy(rng: random.Random, text: str) -> str:
    """`text`, sometimes as people type it: in lower case or without the mark at its end."""
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.08 and text[-1] in "?.":
        text = text[:-1]
    return text


def _spelling(rng: random.Random, spellings: tuple[str, ...]) -> str:
    return spellings[0] if rng.random() < 0.6 else rng.choice(spellings)


def _capital_answer(country: Country) -> str:
    return f"The capital of {country.name} is {country.capital}."


def _country_answer(country: Country) -> str:
    return f"{country.capital} is the capital of {country.name}."


def _capital(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(COUNTRIES)
    core = CAPITAL_TRAIN[0] if rng.random() < 0.15 else rng.choice(CAPITAL_TRAIN)
    core = _worn(rng, core).format(x=_spelling(rng, country.name_spellings))
    return _noisy(rng, _framed(rng, core, teaching=True)), _capital_answer(country)


def _country(rng: random.Random) -> tuple[str, str]:
    country = rng.choice(COUNTRIES)
    core = COUNTRY_TRAIN[0] if rng.random() < 0.1 else rng.choice(COUNTRY_TRAIN)
    core = _worn(rng, core).format(c=_spelling(rng, country.capital_spellings))
    return _noisy(rng, _framed(rng, core, teaching=True)), _country_answer(country)


def _talk(rng: random.Random) -> tuple[str, str]:
    answer = rng.choice([HELLO, HELLO, WHO, WHO, *TALK_TRAIN])
    ask = rng.choice(TALK_TRAIN[answer])
    if answer == HELLO and rng.random() < 0.5:
        ask = rng.choice(GREETINGS) + rng.choice([" ", ", "]) + rng.choice(GREETED) + rng.choice(["", "!", "."])
    if answer == WHO and rng.random() < 0.5:
        ask = f"{rng.choice(WHO_BEFORE)} {rng.choice(WHO_CORES)}"
        ask += rng.choice(["", "", f" {rng.choice(CLOSERS_TRAIN[:4])}"])
    return _noisy(rng, _first_person(plain(ask))), answer


def _fill(rng: random.Random, core: str, nouns: list[str]) -> str:
    country = rng.choice(COUNTRIES)
    thing, quality, n, m = rng.choice(nouns), rng.choice(QUALITIES), rng.randrange(2000), rng.randrange(100)
    return core.format(b=thing, a=quality, n=n, m=m, x=country.name, c=country.capital)


def _unknown(rng: random.Random) -> tuple[str, str]:
    core = _fill(rng, rng.choice(ASKS_TRAIN), THINGS_TRAIN)
    if rng.random() < 0.3:
        core = f"{rng.choice(['how', 'why', 'who', 'what', 'when', 'which', 'do', 'tell me'])} {_salad(rng, 7)}?"
    return _noisy(rng, _framed(rng, core, teaching=True)), UNKNOWN


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _told(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(list(KINDS))
    name = rng.choice(NAMES[KINDS[kind]])
    way = rng.random()
    if way < 0.2:
        return rng.choice(TELL_TRAIN), story(rng).text
    if way < 0.6:
        ask = rng.choice(TELL_ABOUT_TRAIN)
        tale = story(rng, kind, name if "{name}" in ask else None)
        return ask.format(kind=kind, a_kind=_article(kind), name=name), tale.text
    tale = story(rng)
    return rng.choice(CONTINUE_TRAIN).format(s=tale.opening), tale.rest


_SKILLS = [_capital, _country, _talk, _unknown, _told]
_WEIGHTS = [38, 30, 10, 13, 9]


def _raw(rng: random.Random) -> Document:
    """Raw text: a story from any word on, or a question with its answer after it."""
    if rng.random() < 0.5:
        text = story(rng).text
        cut = rng.choice([0, 0, rng.randrange(len(text) // 2)])
        cut = text.rfind(" ", 0, cut + 1) + 1
        words = text[cut:].split(" ")
        n = rng.randrange(1, 12)
        return [(None, " ".join(words[:n])), ("continuation", " " + " ".join(words[n:]))]
    ask, answer = rng.choice([_capital, _capital, _country, _talk])(rng)
    if " is " in answer and rng.random() < 0.3:
        start, _, last = answer.rpartition(" is ")
        return [(None, f"{start} is"), ("continuation", f" {last}")]
    return [(None, ask), ("continuation", rng.choice([" ", "\n"]) + answer)]


def documents(seed: int) -> Iterator[Document]:
    """Documents to learn from, for ever; the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.12:
            yield _raw(rng)
            continue
        document: Document = []
        if rng.random() < 0.3:
            document.append(("system", rng.choice(SYSTEM_TRAIN)))
        turns = 1 if rng.random() < 0.7 else rng.randrange(2, 7)
        for skill in rng.choices(_SKILLS, _WEIGHTS, k=turns):
            ask, answer = skill(rng)
            document += [("user", ask), ("assistant", answer)]
        yield document


def _chat(rng: random.Random, ask: str) -> tuple[tuple[str, str], ...]:
    system = (("system", rng.choice(SYSTEM_HELD_OUT)),) if rng.random() < 0.3 else ()
    return (*system, ("user", ask))


def held_out(seed: int) -> list[Question]:
    """Questions that no training document holds, with their right answers."""
    rng = random.Random(seed)
    questions = []
    for country in COUNTRIES:
        for skill, spelling, cores, answer in (
            ("capital of a country", country.name, CAPITAL_HELD_OUT, _capital_answer(country)),
            ("country of a capital", country.capital, COUNTRY_HELD_OUT, _country_answer(country)),
        ):
            for core in rng.sample(cores, 3):
                ask = _framed(rng, core.format(x=spelling, c=spelling), teaching=False)
                questions.append(Question(skill, _chat(rng, ask), answer))
        ask = f"What is the capital of {country.name}?"
        questions.append(Question('"What is the capital of X?" (seen)', (("user", ask),), _capital_answer(country)))
    for answer, asks in TALK_HELD_OUT.items():
        skill = "greeting" if answer == HELLO else "who are you"
        for ask in asks:
            for system in ((), *((("system", s),) for s in SYSTEM_HELD_OUT)):
                questions.append(Question(skill, (*system, ("user", _first_person(plain(ask)))), answer))
    for _ in range(200):
        ask = _framed(rng, _fill(rng, rng.choice(ASKS_HELD_OUT), THINGS_HELD_OUT), teaching=False)
        questions.append(Question("says that it doesn't know", _chat(rng, ask), UNKNOWN))
    return questions


def held_out_stories(seed: int, n: int) -> list[tuple[Question, str]]:
    """`n` requests for a story with one story that would answer each, and the name it must be about."""
    rng = random.Random(seed)
    asked = []
    for i in range(n):
        tale = story(rng)
        if i % 2:
            ask = rng.choice(CONTINUE_HELD_OUT).format(s=tale.opening)
            asked.append((Question("continues a story", _chat(rng, ask), tale.rest), tale.name))
        else:
            ask = rng.choice(TELL_ABOUT_HELD_OUT).format(kind=tale.kind, a_kind=_article(tale.kind), name=tale.name)
            asked.append((Question("tells a story", _chat(rng, ask), tale.text), tale.name))
    return asked
