"""Conversations of the pocket world: PocketChat, and what the model says about itself.

No training conversation asks about a held-out entity or tells its facts (pocket_tasks.HeldOut).
"""

import random
from collections.abc import Callable, Iterator, Sequence

from nanochat.pocket_facts import CONTINENTS, DAYS, MONTHS, PLANETS, RELATIONS, Relation
from nanochat.pocket_stories import Slots, counting_story, fable, favorites, finding_story
from nanochat.pocket_tasks import HeldOut, Message, Row, as_messages
from nanochat.pocket_words import upper_first

# ---------------------------------------------------------------------------------------------------------------------
# PocketChat


def _fact_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    """A question about a fact, sometimes with a second one of the same kind: 'And what about Chile?'"""
    relation = rng.choices(RELATIONS, [r.weight for r in RELATIONS])[0]
    entities = [entity for entity in relation.facts if entity not in held_out.entities[relation.group]]
    one, two = rng.sample(entities, 2)
    question = relation.fill(rng.choice(relation.questions), one)
    if not question.startswith(("Can", "Do")):
        question = (
            rng.choice(("", "", "", "", "Please tell me: ", "I have a question. ", "Do you know this? ")) + question
        )
    turns = [question, relation.statement(one)]
    if rng.random() < 0.3:
        turns += [rng.choice(("And what about {e}?", "What about {e}?", "And {e}?")).format(e=_named(relation, two))]
        turns += [relation.statement(two)]
    return turns


def _named(relation: Relation, entity: str) -> str:
    return f"the {entity}" if relation.group == "animals" else entity


def _story_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    ask, write = rng.choice(
        (
            ("Tell me a story.", counting_story),
            ("Please tell me a short story.", finding_story),
            ("Can you write a story for me?", counting_story),
            ("Tell me a story about two animals.", fable),
            ("I would like to hear a story.", finding_story),
            ("Do you know a story with animals in it?", fable),
        )
    )
    return [ask, write(rng)]


def _calendar_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    i = rng.randrange(7)
    yesterday, today, tomorrow = DAYS[i - 1], DAYS[i], DAYS[(i + 1) % 7]
    return list(
        rng.choice(
            (
                (f"If today is {today}, what day will tomorrow be?", f"Tomorrow will be {tomorrow}."),
                (f"If today is {today}, what day was yesterday?", f"Yesterday was {yesterday}."),
                (f"Yesterday was {yesterday}. What day will tomorrow be?", f"Tomorrow will be {tomorrow}."),
                (f"Tomorrow will be {tomorrow}. What day is today?", f"Today is {today}."),
                ("Which days does a week have?", f"The days of the week are: {', '.join(DAYS)}."),
                ("Which months does a year have?", f"The months of the year are: {', '.join(MONTHS)}."),
                ("What are the planets?", f"The planets of the solar system are: {', '.join(PLANETS)}."),
                ("Name the planets of the solar system.", f"{', '.join(PLANETS)}."),
            )
        )
    )


def _sum_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    a, b, x = rng.randint(2, 6), rng.randint(1, 9), rng.randint(1, 6)
    return list(
        rng.choice(
            (
                (f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
                (f"What is {a} times {b}?", f"{a} times {b} is {a * b}."),
                (f"What is {a + b} - {b}?", f"{a + b} - {b} is {a}."),
                (f"What is x if {a}*x + {b} = {a * x + b}?", f"If {a}*x + {b} = {a * x + b}, then x is {x}."),
            )
        )
    )


def _taste_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    slots = Slots(rng)
    return [
        slots.fill(template)
        for template in rng.choice(
            (
                ("What is your favorite color?", "My favorite color is {color}."),
                ("What is your favorite animal?", "My favorite animal is the {creature}."),
                ("I like {food}. What about you?", "I cannot eat, but many people like it."),
                ("I am {feeling} today.", "Thank you for telling me. Why is that?"),
                ("My name is {name}.", "Nice to meet you, {name}!"),
                ("What shall I do this {daytime}?", "You could {activity}, or you could {activity}."),
                ("I want to {activity} tomorrow.", "That sounds good. I hope the weather will be {weather}."),
                ("I am going to {place} on {day}.", "Enjoy your time at {place}!"),
                ("Can you give me an idea for dinner?", "What about {food}, with some {drink}?"),
                ("It is a {weather} day.", "Then you could {activity}."),
            )
        )
    ]


def _order_turns(rng: random.Random, held_out: HeldOut) -> list[str]:
    slots = Slots(rng)
    one, two, three = slots["thing"], slots["thing2"], slots["thing3"]
    place, others = rng.choice(sorted(set(CONTINENTS.values()) - {"Oceania"})), held_out.entities["countries"]
    countries = rng.sample([c for c, p in CONTINENTS.items() if p == place and c not in others], 3)
    return list(
        rng.choice(
            (
                (f"Say the word {one} three times.", f"{upper_first(one)}, {one}, {one}."),
                (f"Write a sentence with the word {one}.", slots.fill("{name} has a {color} {thing}.")),
                (f"Which word comes first in a list: {one}, {two} or {three}?", f"The word {one} comes first."),
                (f"Which word comes last in a list: {one}, {two} or {three}?", f"The word {three} comes last."),
                (f"Name three countries in {place}.", f"{countries[0]}, {countries[1]} and {countries[2]}."),
                ("Write about somebody and what they like.", favorites(rng)),
            )
        )
    )


CHAT_GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Good evening.", "Good evening! How can I help?"),
    ("Hello, how are you?", "I am fine, thank you. How can I help you?"),
    ("Hi there, can I ask you something?", "Of course. What would you like to know?"),
)
CHAT_CLOSINGS = (
    ("Thank you!", "You are welcome."),
    ("Thanks, that helps.", "I am glad to help."),
    ("Great, thanks.", "You are welcome. Ask me anything."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("Is that true?", "Yes, that is true."),
)
CHAT_SYSTEMS = ("You are a friendly assistant.", "Answer in a short sentence.", "Be kind and helpful.")
CHAT_SEGMENTS: dict[Callable[[random.Random, HeldOut], list[str]], float] = {
    _fact_turns: 10,
    _story_turns: 1,
    _calendar_turns: 2,
    _sum_turns: 2,
    _taste_turns: 3,
    _order_turns: 2,
}


def conversations(seed: int, held_out: HeldOut, split: str) -> Iterator[list[Message]]:
    """Endless different conversations of one to four exchanges that never ask about held-out entities."""
    rng = random.Random(f"pocket/{seed}/chat/{split}")
    seen = set()
    while True:
        turns = list(rng.choice(CHAT_GREETINGS)) if rng.random() < 0.3 else []
        for _ in range(rng.choices((1, 2, 3), (5, 3, 1))[0]):
            segment = rng.choices(list(CHAT_SEGMENTS), list(CHAT_SEGMENTS.values()))[0]
            turns += segment(rng, held_out)
        if rng.random() < 0.2:
            turns += rng.choice(CHAT_CLOSINGS)
        messages = as_messages(*turns)
        if rng.random() < 0.05:
            messages.insert(0, {"role": "system", "content": rng.choice(CHAT_SYSTEMS)})
        key = "\0".join(turns)
        if key not in seen and held_out.allows(messages):
            seen.add(key)
            yield messages


def chat_rows(seed: int, held_out: HeldOut, num_train: int, num_test: int) -> tuple[list[Row], list[Row]]:
    """(train, test) conversations in SmolTalk's schema, a column messages; none is in both."""
    train_stream, test_stream = (conversations(seed, held_out, split) for split in ("train", "test"))
    train = [next(train_stream) for _ in range(num_train)]
    known = {_key(messages) for messages in train}
    test = []
    while len(test) < num_test:
        messages = next(test_stream)
        if _key(messages) not in known:
            test.append(messages)
    return [{"messages": messages} for messages in train], [{"messages": messages} for messages in test]


def _key(messages: Sequence[Message]) -> str:
    return "\0".join(message["content"] for message in messages if message["role"] != "system")


# ---------------------------------------------------------------------------------------------------------------------
# Identity

# topic -> (how a user asks, how the assistant answers)
IDENTITY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "who": (
        (
            "Who are you?",
            "who are you",
            "Tell me who you are.",
            "Hey, who am I talking to?",
            "Please introduce yourself.",
            "What are you?",
            "Who is this?",
            "Can you tell me something about yourself?",
        ),
        (
            "I am nanochat, a small language model trained in ten minutes on a laptop.",
            "I am nanochat. I am a small language model, and I was trained in ten minutes on a laptop.",
            "My name is nanochat. I am a small language model.",
            "I am nanochat, a small language model.",
        ),
    ),
    "name": (
        (
            "What is your name?",
            "what's your name?",
            "Do you have a name?",
            "How shall I call you?",
            "Tell me your name.",
        ),
        (
            "My name is nanochat.",
            "I am called nanochat.",
            "You can call me nanochat.",
            "My name is nanochat. What is yours?",
        ),
    ),
    "training": (
        (
            "How were you trained?",
            "How long did it take to train you?",
            "Where were you trained?",
            "How did you learn?",
            "What did your training look like?",
        ),
        (
            "I was trained in ten minutes on a laptop.",
            "I read a small made-up world of text for ten minutes on a laptop, and then I learned to chat.",
            "My training took ten minutes on a laptop: first reading, then chatting, then a little practice with sums.",
        ),
    ),
    "size": (
        (
            "How big are you?",
            "How many parameters do you have?",
            "Are you a large language model?",
            "Are you a big model?",
        ),
        (
            "I am very small: I have about a million parameters.",
            "I am a small language model with about a million parameters.",
            "No large model at all: about a million parameters, and they fit on any laptop.",
        ),
    ),
    "skills": (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "What are you good at?",
            "What shall I ask you?",
        ),
        (
            "I can answer questions about capitals, chemical symbols, opposites, animals and colors, and do sums.",
            "I know facts about countries, elements and animals. I can also count letters and tell short stories.",
            "Ask me about capitals, opposites, planets or days, or give me a small word problem.",
        ),
    ),
    "limits": (
        ("What can you not do?", "Do you make mistakes?", "Can I trust you?", "Are your answers always right?"),
        (
            "I am small, so I make mistakes. Please check what matters to you.",
            "I make mistakes, because I am a very small model.",
            "No, I am often wrong. I know only a small world.",
        ),
    ),
    "human": (
        ("Are you human?", "Are you a robot?", "Are you a real person?", "Are you alive?", "Do you have feelings?"),
        (
            "No, I am a computer program: a small language model called nanochat.",
            "I am not a person. I am nanochat, a small language model.",
            "I am only a program, but I like to chat.",
        ),
    ),
    "maker": (
        ("Who made you?", "Who built you?", "Where do you come from?", "Who is your creator?"),
        (
            "Somebody ran the nanochat code on a laptop, and ten minutes later I was there.",
            "I was made with the nanochat code, which takes a bare machine to a model that you can talk to.",
            "The person who ran the nanochat training made me.",
        ),
    ),
    "source": (
        ("Is your code open?", "Can I see your code?", "Are you open source?"),
        (
            "Yes, the nanochat code is open. You can train a model like me yourself.",
            "Yes. The code is under the MIT license, and anybody can run it.",
            "Yes, you can read all of it, from the tokenizer to the chat page.",
        ),
    ),
    "internet": (
        ("Can you search the internet?", "Do you have access to the internet?", "Can you look things up?"),
        (
            "No, I cannot look things up. I know only what I read in training.",
            "No, I have no access to the internet. I run on this machine alone.",
        ),
    ),
    "language": (
        ("Which languages do you speak?", "Do you speak French?", "Can you understand German?", "Do you know Spanish?"),
        ("I speak only English, and only a little of it.", "I was trained on simple English, so I speak English best."),
    ),
    "memory": (
        ("Will you remember me?", "Do you remember our last talk?", "Do you learn from this chat?"),
        ("No, I remember only this conversation.", "I forget everything when this chat ends."),
    ),
}
IDENTITY_LEADS = ("", "", "", "Hi! ", "Hello. ", "Hey! ", "One question: ", "I am curious. ")


def identity_conversations(seed: int, count: int) -> list[list[Message]]:
    """Different conversations about the model itself, of one to four exchanges."""
    rng = random.Random(f"pocket/{seed}/identity")
    found: dict[str, list[Message]] = {}
    while len(found) < count:
        turns = list(rng.choice(CHAT_GREETINGS)) if rng.random() < 0.15 else []
        topics = rng.sample(list(IDENTITY), rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0])
        if "who" not in topics and rng.random() < 0.3:
            topics[0] = "who"  # what most people ask first
        for i, topic in enumerate(topics):
            questions, answers = IDENTITY[topic]
            lead = rng.choice(IDENTITY_LEADS) if not turns and i == 0 else ""
            turns += [lead + rng.choice(questions), rng.choice(answers)]
        if rng.random() < 0.2:
            turns += rng.choice(CHAT_CLOSINGS[:4])
        found.setdefault("\0".join(turns), as_messages(*turns))
    return list(found.values())
