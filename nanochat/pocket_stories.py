"""Stories and talk of the pocket world: templates, and the Slots that fill them so that a text stays consistent.

Counted things add up, a person keeps name and pronoun, and what is drawn twice in a text is drawn differently.
"""

import random
from collections.abc import Sequence

from nanochat.pocket_facts import COLORS, DAYS, MONTHS, RELATION
from nanochat.pocket_words import CONTAINERS, GIRLS, PEOPLE, THINGS, fix_articles, plural

NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.replace("\n", " ").split(",")]


# What the slots of a template are filled with.
VOCABULARY: dict[str, Sequence[str]] = {
    "thing": THINGS,
    "container": CONTAINERS,
    "color": COLORS,
    "day": DAYS,
    "month": MONTHS,
    "season": _phrases("spring, summer, autumn, winter"),
    "daytime": _phrases("morning, afternoon, evening"),
    "weather": _phrases("sunny, rainy, windy, cold, warm, foggy, bright, gray, cool"),
    "place": _phrases("""
the market, the park, the library, the beach, the forest, the museum, the river, the lake, the harbor, the farm, the
school, the garden, the station, the bakery, the castle, the zoo, the mountains, the old mill, the playground, the
bookshop, the theater, the village, the meadow, the orchard, the town square
"""),
    "nature": _phrases("a river, a lake, a forest, a hill, a meadow, a mountain, a pond, a valley, the sea"),
    "spot": _phrases("""
under the bed, behind the door, on the roof, in the kitchen, under a tree, in the garden, on the stairs, in the
attic, behind the curtain, near the gate, under the table, in the cellar, on the bench, next to the well, in the old
boat, between two books, on the window sill, in the tall grass
"""),
    "relative": _phrases("mother, father, sister, brother, grandmother, grandfather, aunt, uncle, cousin, neighbor"),
    "trait": _phrases("""
brave, clever, kind, curious, quiet, cheerful, shy, proud, patient, lazy, hungry, careful, gentle, funny
"""),
    "feeling": _phrases(
        "happy, tired, proud, surprised, excited, glad, hungry, calm, thankful, pleased, nervous, curious"
    ),
    "quality": _phrases("wonderful, long, quiet, strange, lovely, busy, perfect, funny, good, special, peaceful"),
    "creature": _phrases("""
fox, hare, bear, owl, mouse, crow, hedgehog, frog, squirrel, goose, goat, donkey, wolf, duck, badger, cat
"""),
    "food": _phrases("""
soup, bread, rice, noodles, pancakes, salad, cheese, porridge, potatoes, apple pie, pasta, fish, bean stew, toast,
dumplings, omelets, pizza, corn
"""),
    "drink": _phrases("milk, water, tea, apple juice, cocoa, lemonade, orange juice"),
    "sport": _phrases("soccer, tennis, swimming, running, chess, basketball, hiking, skating, cycling"),
    "subject": _phrases("history, music, math, science, reading, art, geography, chemistry"),
    "activity": _phrases("""
read a book, ride a bicycle, fly a kite, bake a cake, paint a picture, play chess, sing a song, plant flowers, build
a sand castle, climb a tree, watch the birds, collect stones, write a letter, swim in the lake, count the stars,
make a paper boat, feed the ducks, play the piano, draw a map, pick berries
"""),
    "shout": _phrases("""
What a nice surprise!, Look at that!, How wonderful!, I did not expect this!, Come and see!, Well done!, Now I
understand!, That is the best idea of all!, I will never forget this day!, Let us do it again!
"""),
}
# These stay the same through a text; a digit at the end ({thing2}) asks for another. The rest is drawn anew every time.
_KEPT = ("relative", "creature", "nature", "weather", "daytime", "place")


class Slots(dict):
    """Values for the slots of templates, drawn when first asked for.

    {name} brings {she}, {her}, {him} and {child}, also with capitals; {thing} brings {things} and
    {container} brings {containers}. {name2} is another.
    Values that are given are used as they are. names: the people who may appear.
    """

    def __init__(self, rng: random.Random, names: Sequence[str] = PEOPLE, **given: object):
        super().__init__(given)
        self.rng = rng
        self.names = names
        self.used: dict[str, list[str]] = {}  # sort -> what was drawn so far

    def __missing__(self, key: str) -> str:
        sort, number = key.rstrip("0123456789"), key[len(key.rstrip("0123456789")) :]
        if sort.lower() in ("name", "she", "her", "him", "child"):
            name = self._draw("name", self.names)
            forms = ("she", "her", "her", "girl") if name in GIRLS else ("he", "his", "him", "boy")
            for slot, form in zip(("she", "her", "him", "child"), forms, strict=True):
                self[slot + number], self[slot.capitalize() + number] = form, form.capitalize()
            self["name" + number] = name
            return self[key]
        if sort.removesuffix("s") in ("thing", "container"):
            one = sort.removesuffix("s")
            noun = self._draw(one, VOCABULARY[one])
            self[one + number], self[one + "s" + number] = noun, plural(noun)
            return self[key]
        value = self._draw(sort, VOCABULARY[sort])
        if sort in _KEPT:
            self[key] = value
        return value

    def fill(self, template: str, **given: object) -> str:
        """The template with its slots filled; given values hold from now on."""
        self.update(given)
        return fix_articles(template.format_map(self))

    def pick(self, templates: Sequence[str], **given: object) -> str:
        """One of the templates, filled."""
        return self.fill(self.rng.choice(templates), **given)

    def _draw(self, sort: str, choices: Sequence[str]) -> str:
        used = self.used.setdefault(sort, [])
        used.append(self.rng.choice([choice for choice in choices if choice not in used] or choices))
        return used[-1]


def number_text(n: int, is_word: bool) -> str:
    """7 -> 'seven' or '7'; numbers above twenty are always written in digits."""
    return NUMBER_WORDS[n] if is_word and n < len(NUMBER_WORDS) else str(n)


# ---------------------------------------------------------------------------------------------------------------------
# Stories about people

OPENINGS = (
    "On {day} {daytime}, {name} went to {place}.",
    "One {weather} {daytime}, {name} walked to {place} with {her} {relative}.",
    "Once upon a time there was a {trait} {child} called {name}, who lived near {place}.",
    "{name} woke up early on {day} because {she} wanted to go to {place}.",
    "Last {season}, {name} spent a week near {place}.",
    "It was a {weather} day in {month}, and {name} was on the way to {place}.",
    "{name} and {name2} were good friends, and every {day} they met near {place}.",
    "{name} was a {trait} {child}. One {daytime} {she} went to {place} to {activity}.",
    "After lunch, {name} and {her} {relative} decided to {activity} near {place}.",
    "In {month}, {name} often went to {place} to {activity}.",
)
COMPANIONS = (
    "{Her} friend {name2} was there too.",
    "There {she} met {name2}, a {trait} {child2}.",
    "{name2} came along.",
    "{Her} best friend was called {name2}.",
)
STARTS = (
    "{She} found {n} {things} in a {container}.",
    "{She} had {n} {things} in {her} {container}.",
    "{name2} gave {him} {n} {things}.",
    "{She} counted the {things} in {her} {container}: there were {n}.",
    "In {her} {container} there were {n} {things}.",
    "{Her} {relative} had given {him} a {container} with {n} {things}.",
)
GAINS = (
    "Then {name2} gave {him} {k} more.",
    "{She} bought {k} more {things}.",
    "A little later {she} found {k} more {spot}.",
    "{name2} brought {k} more {things}.",
    "{Her} {relative} had {k} more for {him}.",
)
LOSSES = (
    "{She} gave {k} of them to {name2}.",
    "On the way {she} lost {k} of them.",
    "{She} put {k} of them aside for {her} {relative}.",
    "{name2} asked for {k} of them, and {name} said yes.",
    "{She} left {k} of them {spot}.",
)
COUNTS = (
    "Now {she} had {n} {things}.",
    "So {she} had {n} {things} now.",
    "{She} counted again: {n} {things}.",
    "That made {n} {things} in the {container}.",
)
MOMENTS = (
    "{She} was very {feeling}.",
    "A {color} bird sat {spot} and sang.",
    'Then {name2} said, "{shout}"',
    "They wanted to {activity} before dinner.",
    "{She} saw a {creature} {spot}.",
    "{name2} told a story about a {trait} {creature}.",
    "Somebody had left a {color} {thing2} {spot}.",
    "They rested for a while and drank some {drink}.",
    "{name2} looked a little {feeling}.",
    "From far away they heard somebody sing.",
)
ENDINGS = (
    "In the evening {she} told {her} {relative2} all about it.",
    "Then they went home and ate {food}.",
    "It had been a {quality} day.",
    "That night {name} dreamed of {things}.",
    "{name} was {feeling}, and so was {name2}.",
    "After that they went home together.",
    "The next day {she} went to {place2} to {activity}.",
    '"{shout}" said {name2} at the end.',
)
MISSED = (
    "But {she} could not find {her} {color} {thing}.",
    "Suddenly {she} noticed that {her} {color} {thing} was gone.",
    "{She} had lost {her} {color} {thing}, and {she} was not happy.",
)
SEARCHES = (
    "{She} looked {spot}, {spot} and {spot}, but it was not there.",
    "First {she} looked {spot}. Then {she} looked {spot}. There was only a {color} {thing2}.",
    "{She} asked {her} {relative}, but {her} {relative} had not seen it.",
    "{name} and {name2} looked {spot} and {spot}, but they only found a {thing2}.",
)
FOUND = (
    "At last {name2} found the {thing} {spot}.",
    "In the end it was {name2} who found the {thing} {spot}.",
    "The {thing} was {spot} all the time, and {name2} saw it first.",
)
THANKS = ('"Thank you," said {name}.', '"{shout}" said {name}.', "{name} thanked {name2}.")


def _scene(slots: Slots) -> list[str]:
    """An opening with two people."""
    opening = slots.pick(OPENINGS)
    return [opening] if "name2" in slots else [opening, slots.pick(COMPANIONS)]


def counting_story(rng: random.Random) -> str:
    """Somebody has things, gets some, gives some away; the counts are right."""
    slots, is_word = Slots(rng), rng.random() < 0.4
    n = rng.randint(3, 14)
    parts = [*_scene(slots), slots.pick(STARTS, n=number_text(n, is_word))]
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            parts.append(slots.pick(MOMENTS))
        is_gain = n < 5 or rng.random() < 0.55
        k = rng.randint(2, 9) if is_gain else rng.randint(2, n - 2)
        parts.append(slots.pick(GAINS if is_gain else LOSSES, k=number_text(k, is_word)))
        n += k if is_gain else -k
        parts.append(slots.pick(COUNTS, n=number_text(n, is_word)))
    return " ".join((*parts, slots.pick(ENDINGS)))


def finding_story(rng: random.Random) -> str:
    """Somebody looks for a thing and a friend finds it."""
    slots = Slots(rng)
    return " ".join(
        (*_scene(slots), *(slots.pick(part) for part in (MISSED, SEARCHES, MOMENTS[1:], FOUND, THANKS, ENDINGS)))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Fables and journeys

FABLE_PARTS = (
    (
        "A {trait} {creature} and a {trait} {creature2} lived near {nature}.",
        "Long ago, a {trait} {creature} met a {trait} {creature2} near {nature}.",
        "In a small house near {nature} lived a {creature}. Its best friend was a {trait} {creature2}.",
    ),
    (
        'One {daytime} the {creature} said, "Let us {activity}."',
        'In {month} the {creature} asked, "Shall we {activity} together?"',
        'On {day} the {creature} came and said, "Today I want to {activity}."',
    ),
    (
        '"I would rather {activity}," said the {creature2}.',
        '"It is too late for that," said the {creature2}. "Shall we {activity}?"',
        '"Good idea," said the {creature2}, "but first we must eat some {food}."',
        '"I have never done that," said the {creature2}, "but I will try."',
    ),
    (
        "The {creature} was {feeling} and agreed.",
        "They talked about it until the evening.",
        "The {creature} thought about it for a long time.",
        "They asked the old {creature3}, who was {trait} and knew what to do.",
    ),
    (
        'In the end the {creature2} said, "{shout}"',
        "From that day on they were the best of friends.",
        "After that the {creature} was never alone again.",
        "It was a {quality} day for both of them.",
    ),
    (
        "And that is why a friend is worth more than {food}.",
        "The other animals still tell this story.",
        "Then the {creature} and the {creature2} went home.",
        "Both slept well that night.",
    ),
)


def fable(rng: random.Random) -> str:
    """Two animals meet."""
    slots = Slots(rng)
    return " ".join(slots.pick(templates) for templates in FABLE_PARTS)


JOURNEY_OPENINGS = (
    "In {month}, {name} and {her} {relative} went on a journey.",
    "{name} had always wanted to see the world. Last {season} {she} set out with {her} {relative}.",
    "{name} is a {trait} traveler. {She} left home on a {weather} {day}.",
)
JOURNEY_STOPS = (
    "Then came {city}, the capital of {country}.",
    "After that {she} saw {city}, the capital of {country}.",
    "From there the way led to {city}, the capital of {country}.",
    "The next stop was {city}, the capital of {country}.",
    "Then {name} went to {city}, the capital of {country}.",
)
JOURNEY_NOTES = (
    "It was a {quality} place.",
    "{name} stayed in {city} for {days} days.",
    "There {she} bought a {color} {thing2}.",
    "{She} met {name2}, who was {feeling}.",
    "{She} liked the {food} there.",
)
JOURNEY_ENDINGS = (
    "Then it was time to go home.",
    "It was a {quality} journey.",
    "At home {she} told {name3} all about it.",
)


def journey(rng: random.Random) -> str:
    """Somebody travels from capital to capital."""
    slots = Slots(rng)
    stops = rng.sample(list(RELATION["capital"].facts.items()), rng.randint(2, 5))
    moves = ["The first stop was {city}, the capital of {country}.", *rng.sample(JOURNEY_STOPS, len(stops) - 1)]
    parts = [slots.pick(JOURNEY_OPENINGS)]
    for move, (country, city) in zip(moves, stops, strict=True):
        parts.append(slots.fill(move, city=city, country=country, days=NUMBER_WORDS[rng.randint(2, 9)]))
        if rng.random() < 0.5:
            parts.append(slots.pick(JOURNEY_NOTES))
    return " ".join((*parts, slots.pick(JOURNEY_ENDINGS)))


# ---------------------------------------------------------------------------------------------------------------------
# People about themselves

FAVORITES = (
    "{My} favorite color is {color}.",
    "{My} favorite animal is the {creature}.",
    "{My} favorite food is {food}.",
    "{My} favorite drink is {drink}.",
    "{My} favorite day is {day}.",
    "{My} favorite month is {month}.",
    "{My} favorite season is {season}.",
    "{My} favorite sport is {sport}.",
    "{My} favorite subject is {subject}.",
    "{My} favorite place is {place}.",
)


def favorites(rng: random.Random) -> str:
    """What somebody likes best, in the first or third person."""
    slots = Slots(rng)
    if rng.random() < 0.6:
        opening = slots.pick(
            ("My name is {name}.", "I am {name}.", "Hello, I am {name}, and I live near {place2}.", "")
        )
        slots["My"] = "My"
    else:
        opening = slots.pick(("This is {name}.", "{name} is a {trait} {child}.", "{name} is a friend of {name2}."))
        slots["My"] = slots["Her"]
    rest = rng.sample(FAVORITES[1:], rng.randint(2, 6))
    likes = rest if rng.random() < 0.2 else [FAVORITES[0], *rest]
    if rng.random() < 0.7:
        rng.shuffle(likes)
    return " ".join((opening, *(slots.fill(like) for like in likes))).strip()
