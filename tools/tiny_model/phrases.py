"""The phrasings: what is said in training (`*_TRAIN`), and what only the examination says (`*_HELD_OUT`).

No line is in both. In a line, {x} stands for a country, {c} for a capital, {b} for things, {a} for how they are, {n}
and {m} for numbers, {kind} for an animal or a child, {name} for its name, {s} for the start of a story.
"""

from __future__ import annotations

__all__ = [
    "ASKS_HELD_OUT",
    "ASKS_TRAIN",
    "CAPITAL_HELD_OUT",
    "CAPITAL_TRAIN",
    "CLOSERS_HELD_OUT",
    "CLOSERS_TRAIN",
    "CONTINUE_HELD_OUT",
    "CONTINUE_TRAIN",
    "COUNTRY_HELD_OUT",
    "COUNTRY_TRAIN",
    "HELLO",
    "OPENERS_HELD_OUT",
    "OPENERS_TRAIN",
    "QUALITIES",
    "SYSTEM_HELD_OUT",
    "SYSTEM_TRAIN",
    "TALK_HELD_OUT",
    "TALK_TRAIN",
    "TELL_ABOUT_HELD_OUT",
    "TELL_ABOUT_TRAIN",
    "TELL_TRAIN",
    "THINGS_HELD_OUT",
    "THINGS_TRAIN",
    "UNKNOWN",
    "WHO",
]


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


def _words(text: str) -> list[str]:
    return text.split()


SYSTEM_TRAIN = _lines("""
You are a helpful assistant.
You are a helpful AI assistant.
You are tea-tiny.
Be kind and brief.
Answer the question.
You answer questions about countries.
You are a friendly assistant.
Be concise.
Answer in one sentence.
You are an expert in geography.
You tell stories to children.
You are a teacher.
Always answer in English.
Help the user as well as you can.
You are a bot in a workflow.
Be polite.
You are a careful assistant. Do not make things up.
Give short answers.
You are an assistant named Tea.
""")

SYSTEM_HELD_OUT = _lines("""
You are a kind and helpful teacher.
Answer politely in one short sentence.
You help people with geography.
You are a concise assistant.
Please be friendly.
""")

CAPITAL_TRAIN = _lines("""
what is the capital of {x}?
what's the capital of {x}?
what is the capital city of {x}?
which city is the capital of {x}?
what city is the capital of {x}?
what is {x}'s capital?
what is the name of the capital of {x}?
which city is {x}'s capital city?
name the capital of {x}.
tell me the capital of {x}.
give me the capital city of {x}.
say what the capital of {x} is.
the capital of {x}?
capital of {x}?
capital of {x}
{x}: what is its capital?
{x}, capital?
do you know the capital of {x}?
what do people call the capital of {x}?
i need the capital of {x}.
write down the capital of {x}.
help me with my homework: what is the capital of {x}?
i am looking for the capital of {x}.
what is the capital of {x} called?
which is the capital city of {x}?
what was the capital of {x} again?
please find the capital of {x} for my list.
is there a capital of {x}?
i want to know what the capital of {x} is.
i don't know the capital of {x}. what is it?
{x} is a country. what is its capital?
can you remember the capital of {x}?
what's {x}'s capital city?
my friend lives in {x}. what is the capital there?
i am going to {x}. what is the capital?
what is the capital of the country named {x}?
for {x}, give me the capital.
the capital of {x} is which city?
""")

CAPITAL_HELD_OUT = _lines("""
what is the name of {x}'s capital city?
can you name the capital city of {x}?
what city is {x}'s capital?
tell me which city is the capital of {x}.
i forgot the capital of {x}.
do you remember what {x}'s capital is?
please look up the capital of {x} for me.
which is the capital of {x}?
the capital city of {x} is called what?
i would like to learn the capital of {x}.
""")

COUNTRY_TRAIN = _lines("""
which country has {c} as its capital?
{c} is the capital of which country?
what country is {c} the capital of?
of which country is {c} the capital?
which country's capital is {c}?
name the country whose capital is {c}.
{c} is the capital of what country?
what country has its capital in {c}?
in which country is {c}?
tell me which country {c} is the capital of.
the capital {c} belongs to which country?
what is {c} the capital of?
which country is {c} the capital of?
{c} is the capital city of what?
what country is {c} in?
where is {c}?
i know the capital is {c}, but what is the country?
give me the country that has the capital {c}.
the capital is {c}. which country is it?
which country does the capital {c} belong to?
say which country has the capital {c}.
what is the country whose capital is {c}?
which country is governed from {c}?
find the country with the capital {c}.
i am in {c}. which country's capital is that?
for {c}, give me the country.
{c} is the capital of
i forgot which country has {c} as its capital city.
{c}: it is the capital of which country?
""")

COUNTRY_HELD_OUT = _lines("""
whose capital is {c}?
{c} is the capital city of which country?
what is the country whose capital city is {c}?
do you know which country has {c} as a capital?
if the capital is {c}, what is the country?
which country has the capital city {c}?
please tell me what country {c} is the capital of.
i need the country whose capital is {c}.
""")

OPENERS_TRAIN = [
    *[""] * 6,
    "Please tell me: ", "Hello! ", "Hi, ", "Quick question: ", "Can you tell me, ", "Geography quiz: ",
    "Excuse me, ", "Question: ", "Please answer: ", "I have a question. ", "Hey, ", "Tell me, ", "So, ", "OK, ",
]  # fmt: skip

OPENERS_HELD_OUT = [
    *[""] * 2,
    "A small question: ", "Good morning! ", "Now tell me, ", "Next question: ",
]  # fmt: skip

CLOSERS_TRAIN = [
    *[""] * 6,
    " Thank you!", " Please answer in one sentence.", " Thanks.", " Please.",
]  # fmt: skip

CLOSERS_HELD_OUT = [
    *[""] * 2,
    " Thank you very much.", " I need it now.",
]  # fmt: skip

HELLO = "Hello! How can I help you?"
WHO = "I am tea-tiny, a very small language model that comes with tea_llm."
CAN = "I know the capitals of countries, and I tell short stories."
FINE = "I am fine, thank you! How can I help you?"
WELCOME = "You are welcome!"
BYE = "Goodbye!"
UNKNOWN = "I am too small to know that. Ask me for a capital or a story."

TALK_TRAIN = {
    HELLO: _lines("""
hello
hello!
hi
hi!
hey
hey!
hi there
hi there!
good morning
good morning!
good day
good evening!
greetings
hello there!
hello, tea!
hi, how can you help?
hello assistant
hello, world!
hey you!
good afternoon
hello, hello!
hi, assistant!
say hello
say hello!
say hi.
please say hello.
"""),
    WHO: _lines("""
who are you?
who are you
what are you?
what is your name?
what's your name?
tell me your name.
are you a robot?
are you a language model?
who am i talking to?
what model are you?
introduce yourself.
tell me who you are.
which model is this?
hello, who are you?
hi! who are you?
are you an ai?
say who you are.
what should i call you?
do you have a name?
hi, what is your name?
"""),
    CAN: _lines("""
what can you do?
what do you know?
how can you help me?
help
help!
what are you good at?
what can i ask you?
what can you tell me?
tell me what you can do.
what are your skills?
"""),
    FINE: _lines("""
how are you?
how are you
how are you today?
how do you do?
hello, how are you?
how is it going?
hi! how are you?
are you well?
how do you feel?
"""),
    WELCOME: _lines("""
thanks
thanks!
thank you
thank you!
thank you very much.
thanks a lot!
great, thanks!
that was nice, thank you.
many thanks.
good answer, thank you!
"""),
    BYE: _lines("""
bye
bye!
goodbye
goodbye!
see you later!
see you!
good night
good night!
bye bye
i have to go. bye!
"""),
}

TALK_HELD_OUT = {
    HELLO: _lines("""
hello there
hello! good morning!
hey there!
hi, tea!
good evening
good afternoon!
"""),
    WHO: _lines("""
please tell me who you are.
so who are you?
may i know your name?
hey, what are you?
who is this?
please introduce yourself.
hello! what is your name?
"""),
}

ASKS_TRAIN = _lines("""
how many {b} are there?
why are {b} {a}?
write a program that counts {b}.
how much do {b} cost?
who invented {b}?
translate "{b}" into French.
what is the best way to cook {b}?
explain {b} to me.
what do you think of {b}?
how do I repair {b}?
when were {b} first made?
what is the meaning of {b}?
give me ten facts about {b}.
can {b} be {a}?
write a poem about {b}.
are {b} {a}?
what is {n} plus {m}?
count to {n}.
how old is {n}?
who was the president in {n}?
what happened in {n}?
what is the weather today?
what time is it?
summarise this text: {b} are {a}.
what is the population of {x}?
how large is {x}?
what do people eat in {x}?
which language is spoken in {x}?
how is the weather in {c}?
who is the king of {x}?
who built {c}?
sort this list: {b}, {a}, {n}.
what colour are {b}?
how far is it to {c}?
what is the currency of {x}?
""")

ASKS_HELD_OUT = _lines("""
where do {b} come from?
what is {n} times {m}?
how do {b} work?
make a list of {b}.
do you like {b}?
how many people live in {x}?
what is the history of {c}?
is it true that {b} are {a}?
when was {c} founded?
who wrote the book about {b}?
""")

THINGS_TRAIN = _words("""
cars computers stars trees clouds mountains engines bees planets numbers windows songs rivers bridges games
shoes letters atoms spiders potatoes phones laws trains paintings diamonds doctors pencils elections
""")

THINGS_HELD_OUT = _words("""
clocks tables oceans robots volcanoes wheels poems mirrors insects banks
""")

QUALITIES = _words("""
red heavy old cheap fast dangerous round loud useful cold strange soft
""")

TELL_TRAIN = _lines("""
Tell me a story.
Tell me a short story.
Please tell me a story.
I want to hear a story.
Write a story.
Write a short story for children.
Can you tell me a bedtime story?
A story, please!
Tell a story to my child.
""")

TELL_ABOUT_TRAIN = _lines("""
Tell me a story about {a_kind}.
Tell me a short story about {a_kind} named {name}.
Write a story about {a_kind}.
I want a story about {a_kind} called {name}.
Please tell me a story about {name} the {kind}.
Do you know a story about {a_kind}?
Write a short story about {name}, who is {a_kind}.
A story about {a_kind}, please.
""")

TELL_ABOUT_HELD_OUT = _lines("""
Can you tell me a story about {a_kind} named {name}?
I would like to hear a story about {name} the {kind}.
Please write a short story about {a_kind} called {name}.
""")

CONTINUE_TRAIN = _lines("""
Continue this story: {s}
Go on with this story: {s}
{s}
How does this story go on? {s}
Finish this story. {s}
Continue: {s}
Here is the start of a story: {s} What happens next?
""")

CONTINUE_HELD_OUT = _lines("""
Please continue this story: {s}
Write the rest of this story: {s}
This is how it begins: {s}
""")
