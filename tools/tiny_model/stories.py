"""Short stories for children, put together from our own sentences."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Story", "story"]


def _words(text: str) -> list[str]:
    return text.split()


KINDS = {
    "bear": "he", "bird": "she", "boy": "he", "bunny": "she", "cat": "she", "cow": "she", "dog": "he", "dragon": "he",
    "duck": "she", "elephant": "he", "fish": "he", "fox": "he", "frog": "he", "girl": "she", "goat": "he", "hen": "she",
    "horse": "he", "kitten": "she", "lion": "he", "mouse": "she", "owl": "she", "penguin": "he", "pig": "he",
    "puppy": "he", "robot": "he", "sheep": "she", "turtle": "he",
}  # fmt: skip
NAMES = {
    "he": _words("Ben Bob Finn Jack Leo Max Milo Noah Oscar Otto Paul Sam Theo Tim Tom"),
    "she": _words("Amy Anna Bella Clara Daisy Ella Emma Ida Lily Lucy Mia Nina Rosa Ruby Zoe"),
}
TRAITS = _words("little young small happy kind brave curious gentle clever shy")
PLACES = [
    "in a small house near the forest", "on a quiet farm", "by a big blue lake", "in a warm nest",
    "at the edge of a town", "under an old tree", "on a green hill", "in a village by the sea",
    "near a long river", "in a sunny valley",
]  # fmt: skip
THINGS = _words("ball kite drum book hat bell boat lamp shell star key basket flower ribbon blanket spoon")
COLOURS = _words("red blue green yellow white purple orange pink")
FOODS = _words("apples berries bread cake carrots cheese honey nuts pears plums")
SPOTS = [
    "behind a big rock", "under a bush", "in the tall grass", "next to a well", "on top of a wall",
    "inside a hollow log", "beside the road", "under the bridge",
]  # fmt: skip
SKIES = ["sunny", "windy", "rainy", "snowy", "cold", "warm", "cloudy", "bright"]

OPENINGS = [
    "Once upon a time, there was a {trait} {kind} named {name}. {He} lived {place}.",
    "Once upon a time, a {trait} {kind} named {name} lived {place}.",
    "There was once a {trait} {kind} called {name}. {He} lived {place}.",
    "{name} was a {trait} {kind}. {He} lived {place}.",
    "Long ago, a {trait} {kind} called {name} lived {place}.",
]
LIKES = [
    "{name} loved to eat {food}.",
    "{name} had a {colour} {thing} and loved it very much.",
    "{name} played outside every day.",
    "{name} liked to sing in the morning.",
    "{name} liked to look at the sky.",
]
PLOTS = [
    [
        "One {sky} day, {name} lost {his} {colour} {thing}.|"
        "One {sky} morning, {name} could not find {his} {colour} {thing}.",
        "{He} looked everywhere, but it was gone.|{He} was very sad and began to cry.|{He} looked inside and outside.",
        '"Do not be sad," said {friend} the {friend_kind}. "I will help you."|{friend} the {friend_kind} saw {him} and '
        'asked, "What is wrong?"',
        "Together they looked for a long time.|They walked and looked and walked again.",
        "At last they found the {thing} {spot}.|Then {friend} saw the {thing} {spot}.",
        '"Thank you, {friend}!" said {name}.|{name} was so happy that {he} hugged {friend}.',
    ],
    [
        "One {sky} day, {name} met a {friend_kind} named {friend}.|"
        "One {sky} day, {name} saw {friend} the {friend_kind} {spot}.",
        '{friend} was hungry and had no food.|"I am so hungry," said {friend}.',
        "{name} had some {food} at home.|{name} had a basket full of {food}.",
        '"You can have some of my {food}," said {name}.|{name} gave {friend} half of the {food}.',
        "They sat down and ate together.|They ate until they were full.",
        "From that day on, they were best friends.|After that, they shared everything.",
    ],
    [
        "One {sky} day, {name} found a {colour} {thing} {spot}.|"
        "One {sky} morning, there was a {colour} {thing} {spot}.",
        '"Whose {thing} is this?" asked {name}.|{name} wanted to keep it, but {he} knew it was not right.',
        "{He} went to ask {friend} the {friend_kind}.|{He} took it to {friend} the {friend_kind}.",
        '"That is my {thing}!" said {friend}. "I lost it."|'
        "{friend} jumped for joy, because it was {friend_his} {thing}.",
        '"Thank you for being honest," said {friend}.|{friend} gave {name} some {food} to say thank you.',
        "{name} felt warm and proud.|{name} went home with a big smile.",
    ],
    [
        "{name} wanted to learn to swim, but {he} was afraid.|{name} was afraid of the dark.|{name} was afraid of loud "
        "noises.",
        "{friend} the {friend_kind} was not afraid at all.|All the others laughed, but not {friend} the {friend_kind}.",
        '"I can help you," said {friend}.|"Hold my hand," said {friend}.',
        "They tried again and again.|They tried a little more every day.",
        'One day, {name} was not afraid any more.|"Look at me!" said {name}. "I am not afraid!"',
        "{friend} was very proud of {him}.|They danced and laughed together.",
    ],
    [
        "One {sky} day, {name} heard a small voice {spot}.|One {sky} night, {name} heard someone cry {spot}.",
        "It was {friend} the {friend_kind}, who had lost the way home.|It was {friend}, a {friend_kind} who was lost.",
        '"Where do you live?" asked {name}.|"Do not cry," said {name}. "I know the way."',
        "They walked over the hill and through the forest.|They followed the river until they saw a light.",
        "{friend_mother} was so glad to see {friend}.|Soon {friend} was safe at home.",
        "{friend_mother} gave {name} some {food}.|{name} waved and went home under the stars.",
    ],
    [
        "One {sky} day, {name} wanted to build a house for {friend} the {friend_kind}.|"
        "One {sky} day, {name} and {friend} the {friend_kind} built a little house.",
        "They took some wood and a {colour} {thing}.|They worked all day long.",
        "Then the wind came, and the house fell down.|But the house was too weak and fell down.",
        '"Let us try again," said {name}.|{name} did not give up.',
        "This time they made the walls thick and strong.|They helped each other and worked more slowly.",
        "The new house stood tall, and they ate {food} inside.|The new house was strong, and {friend} said thank you.",
    ],
]
ENDINGS = [
    "They lived happily ever after.",
    "And {name} slept well that night.",
    "It was a very good day.",
    "{name} learned that a good friend is the best thing of all.",
    "The end.",
]

_FORMS = {"he": ("He", "him", "his"), "she": ("She", "her", "her")}


@dataclass(frozen=True)
class Story:
    """A whole story, its first two sentences or so, and who it is about."""

    opening: str
    rest: str
    kind: str
    name: str

    @property
    def text(self) -> str:
        """The whole story."""
        return f"{self.opening} {self.rest}"


def story(rng: random.Random, kind: str | None = None, name: str | None = None) -> Story:
    """A story about a `kind` called `name`; whatever is None is chosen by `rng`."""
    kind = kind or rng.choice(list(KINDS))
    he = KINDS[kind]
    name = name or rng.choice(NAMES[he])
    friend_kind = rng.choice([k for k in KINDS if k != kind])
    friend = rng.choice([n for n in NAMES[KINDS[friend_kind]] if n != name])
    capital_he, him, his = _FORMS[he]
    words = {
        "kind": kind, "name": name, "he": he, "He": capital_he, "him": him, "his": his,
        "friend": friend, "friend_kind": friend_kind, "friend_his": _FORMS[KINDS[friend_kind]][2],
        "friend_mother": f"{friend}'s mother",
        "trait": rng.choice(TRAITS), "place": rng.choice(PLACES), "thing": rng.choice(THINGS),
        "colour": rng.choice(COLOURS), "food": rng.choice(FOODS), "spot": rng.choice(SPOTS), "sky": rng.choice(SKIES),
    }  # fmt: skip
    plot = [rng.choice(sentence.split("|")) for sentence in rng.choice(PLOTS)]
    sentences = [rng.choice(LIKES), *plot, rng.choice(ENDINGS)]
    text = [sentence.format(**words) for sentence in (rng.choice(OPENINGS), *sentences)]
    text = [_with_article(sentence) for sentence in text]
    return Story(text[0], " ".join(text[1:]), kind, name)


def _with_article(text: str) -> str:
    """`text` with "a" made "an" before the words of ours that need it."""
    for word in ("elephant", "owl", "orange"):
        text = text.replace(f" a {word}", f" an {word}")
    return text
