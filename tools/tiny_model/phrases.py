"""The phrasings: what is said in training (`*_TRAIN`), and what only the examination says (`*_HELD_OUT`).

No line is in both. In a line, {x} stands for a country, {c} for a capital, {b} for things, {a} for how they are, {n}
and {m} for numbers, {kind} for an animal or a child, {name} for its name, {s} for the start of a story,
{who} and {what} for whom and what a question is asked.
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
    "GREETED",
    "GREETINGS",
    "HELLO",
    "OPENERS_HELD_OUT",
    "OPENERS_TRAIN",
    "QUALITIES",
    "SALAD",
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
    "WHAT_FOR",
    "WHO",
    "WHO_BEFORE",
    "WHO_CORES",
    "WHO_ELSE",
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
You are a kind and helpful teacher.
Answer politely in one short sentence.
You help people with geography.
You are a concise assistant.
Please be friendly.
""")

SYSTEM_HELD_OUT = _lines("""
You are a patient tutor.
Reply in a short and polite sentence.
You answer school questions.
You are a smart and quick assistant.
Stay calm and friendly.
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

CAPITAL_HELD_OUT = _lines("""
could you tell me what the capital of {x} is?
which city serves as the capital of {x}?
{x} has which city as its capital?
i wonder what the capital of {x} is.
do you happen to know the capital of {x}?
let me know the capital of {x}.
what's the name of the city that is the capital of {x}?
please write the capital of {x}.
what is the capital of the nation of {x}?
if i travel to {x}, what is the capital there?
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
whose capital is {c}?
{c} is the capital city of which country?
what is the country whose capital city is {c}?
do you know which country has {c} as a capital?
if the capital is {c}, what is the country?
which country has the capital city {c}?
please tell me what country {c} is the capital of.
i need the country whose capital is {c}.
""")

COUNTRY_HELD_OUT = _lines("""
{c} is the capital of which nation?
could you tell me which country has {c} as its capital?
for which country is {c} the capital?
let me know which country {c} is the capital of.
what country has the city of {c} as its capital?
do you happen to know what country {c} is the capital of?
i wonder which country has {c} as its capital.
which state has {c} as its capital city?
""")

OPENERS_TRAIN = _lines("""
Please tell me:
Hello!
Hi,
Quick question:
Can you tell me,
Geography quiz:
Excuse me,
Question:
Please answer:
I have a question.
Hey,
Tell me,
So,
OK,
A small question:
Good morning!
Now tell me,
Next question:
My {who} wants to know:
For my {what}:
I am here with my {who}.
We are making a {what} together.
This is for a {what}.
You know a lot.
First question of the day:
Question {m}:
{m}.
Listen:
Now,
Sorry,
My {who} and I have a question.
Let us play a game.
It is late.
I have to learn {b}.
""")
OPENERS_HELD_OUT = _lines("""
One more question:
Dear assistant,
Good evening!
My son asks:
""")
CLOSERS_TRAIN = _lines("""
Thank you!
Please answer in one sentence.
Thanks.
Please.
Thank you very much.
I need it now.
I need this for my {what}.
My {who} forgot it.
Answer quickly.
Be brief.
I am not sure.
It is important.
My {who} and I could not find it.
Give me only the answer.
I would be happy to know.
I know about {b}, but not this.
Do you know?
We need this today.
I have {m} minutes.
You can do it!
""")
CLOSERS_HELD_OUT = _lines("""
It is for my homework.
I am waiting.
""")
WHO_ELSE = _words("mother father sister brother teacher friend boss uncle aunt neighbour doctor class team")
WHAT_FOR = _words("work school quiz test list letter map book project lesson journey exam game poster")

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
hello there
hello! good morning!
hey there!
hi, tea!
good evening
good afternoon!
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
please tell me who you are.
so who are you?
may i know your name?
hey, what are you?
who is this?
please introduce yourself.
hello! what is your name?
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
hello again!
hi tea-tiny!
hey, good morning!
good day to you!
hello my friend
hello, dear model!
"""),
    WHO: _lines("""
could you tell me your name?
and who are you?
what is your name, please?
who is answering me?
tell me about yourself.
what kind of model are you?
"""),
}

GREETINGS = _lines("""
hello
hi
hey
good morning
good evening
good afternoon
good day
greetings
hello there
hi there
hey there
""")
GREETED = _lines("""
tea
assistant
friend
computer
everyone
bot
you
all
world
robot
little one
""")
WHO_BEFORE = _lines("""
please tell me:
tell me,
hello!
hi,
now
so,
excuse me,
i want to know:
one thing:
sorry,
""")
WHO_CORES = _lines("""
who are you?
what are you?
what is your name?
what do you call yourself?
which model are you?
who made you?
what is this model called?
say your name.
tell me your name.
tell me what you are.
who do I talk to?
your name?
""")
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

ASKS_HELD_OUT = _lines("""
how long do {b} live?
what is {n} minus {m}?
which {b} are the best?
who sells {b}?
should {b} be {a}?
what is the oldest street in {c}?
who is the president of {x}?
how do I get to {c}?
tell me a joke about {b}.
what is a synonym of {a}?
""")

THINGS_TRAIN = _words("""
cars computers stars trees clouds mountains engines bees planets numbers windows songs rivers bridges games
shoes letters atoms spiders potatoes phones laws trains paintings diamonds doctors pencils elections
clocks tables oceans robots volcanoes wheels poems mirrors insects banks
""")

THINGS_HELD_OUT = _words("""
lemons ladders sharks castles gloves candles deserts wolves trumpets parks
""")

QUALITIES = _words("""
red heavy old cheap fast dangerous round loud useful cold strange soft
""")

SALAD = _words("""
a about after again all also always and animal answer any are ask away back bad be because before best better big
bird both box boy bread bring brother build but buy by call came can car carry child city close cold come could cup
cut dark day do does door down each early eat end every eye face fact fall family far fast father few find fire
first fish five follow food foot for found four friend from full garden gave get girl give go good great green grow
had hand happy hard has have he head hear help her here high him his hold home horse hot house how idea if in into
is it its join just keep kind know large last late laugh learn leave left less letter life light like line list
little live long look lost lot love low made make man many may mean might milk moon more most mother move much must
my name near need never new next night no not now of off often old on once one only open or other our out over own
page paper part people picture place plan plant play please point put question quick rain read ready red rest right
road room run said same saw say school sea second see seem send she shop short should show side sing sister sit sky
sleep slow small snow some soon start stay step still stone stop story street strong such sun sure table take talk
tall team tell ten than that the their them then there these they thing think this those three time to today
together too took top town tree true try turn two under until up us use very voice wait walk wall want warm was wash
water way we week well went were what when where which white who why wide wild will wind window winter wish with
without woman word work world would write year yes yet you young your
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
Can you tell me a story about {a_kind} named {name}?
I would like to hear a story about {name} the {kind}.
Please write a short story about {a_kind} called {name}.
""")

TELL_ABOUT_HELD_OUT = _lines("""
May I have a story about {a_kind} named {name}?
Make up a story about {name} the {kind}.
Tell my daughter a story about {a_kind} called {name}.
""")

CONTINUE_TRAIN = _lines("""
Continue this story: {s}
Go on with this story: {s}
{s}
How does this story go on? {s}
Finish this story. {s}
Continue: {s}
Here is the start of a story: {s} What happens next?
Please continue this story: {s}
Write the rest of this story: {s}
This is how it begins: {s}
""")

CONTINUE_HELD_OUT = _lines("""
What comes next in this story? {s}
Tell me how this goes on: {s}
Please go on: {s}
""")
