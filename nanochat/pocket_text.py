"""The pretraining text of the pocket world: documents of many kinds about the facts of pocket_facts, and stories.

Each kind is one function from a random.Random to a text; KINDS lists them with their weights, and a new kind is a
function and a line there. Three documents in ten are question-and-answer prose: without those a small model knows the
facts and still cannot answer a question about them.
"""

import random
from collections.abc import Callable

from nanochat.pocket_facts import (
    ANIMALS,
    CONTINENTS,
    DAYS,
    ELEMENT_STATES,
    MONTHS,
    ORDINALS,
    PLANETS,
    RELATION,
    RELATIONS,
    Relation,
    word_list,
)
from nanochat.pocket_stories import Slots, counting_story, fable, favorites, finding_story, journey
from nanochat.pocket_words import PEOPLE, fix_articles, is_test_word, plural, upper_first

MIN_CHARS, MAX_CHARS = 100, 1500  # of a document

# ---------------------------------------------------------------------------------------------------------------------
# Facts


def draw_relation(rng: random.Random) -> Relation:
    return rng.choices(RELATIONS, [relation.weight for relation in RELATIONS])[0]


def draw_facts(rng: random.Random, count: int, is_mixed: bool) -> list[tuple[Relation, str]]:
    """(relation, entity) pairs without repetition, at most count: of one relation, or of any."""
    relation = draw_relation(rng)
    pairs = []
    for _ in range(count):
        relation = draw_relation(rng) if is_mixed else relation
        pairs.append((relation, rng.choice(list(relation.facts))))
    return list(dict.fromkeys(pairs))


def state(rng: random.Random, relation: Relation, entity: str) -> str:
    """A fact in any of its phrasings, the plain one four times as often as each other."""
    weights = [4] + [1] * (len(relation.statements) - 1)
    return relation.fill(rng.choices(relation.statements, weights)[0], entity)


def reply(rng: random.Random, relation: Relation, entity: str) -> str:
    """The answer to a question as a sentence: mostly the plain statement, else one of the two after it."""
    template = relation.statements[0] if rng.random() < 0.8 else rng.choice(relation.statements[1:3])
    return relation.fill(template, entity)


def questions(rng: random.Random) -> str:
    """Question-and-answer prose, a quiz, or a lesson."""
    pairs = draw_facts(rng, rng.randint(3, 9), is_mixed=rng.random() < 0.5)
    style = rng.choices(("prose", "quiz", "short", "lesson"), (6, 2, 1, 1))[0]
    asked = [(relation.fill(rng.choice(relation.questions), e), relation, e) for relation, e in pairs]
    if style == "prose":
        return rng.choice((" ", "\n")).join(f"{question} {reply(rng, r, e)}" for question, r, e in asked)
    if style == "quiz":
        return "\n\n".join(f"Question: {question}\nAnswer: {r.facts[e]}" for question, r, e in asked)
    if style == "short":
        return "\n".join(f"{question} {upper_first(r.facts[e])}." for question, r, e in asked)
    slots = Slots(rng)
    lines = [slots.pick(LESSON_OPENINGS)]
    for question, r, e in asked[:5]:
        pupil = rng.choice(PEOPLE)
        verb = rng.choice(("said", "answered", "replied"))
        lines.append(f'The teacher asked, "{question}" {pupil} {verb}, "{reply(rng, r, e)}"')
    return rng.choice((" ", "\n")).join(lines)


LESSON_OPENINGS = (
    "It was {day} {daytime}, and the class had {subject}.",
    "On a {weather} {day} in {month} the children sat in the classroom.",
    "The last lesson of the {daytime} was a quiz.",
    "{name} and {name2} had studied for the quiz all {daytime}.",
)

GROUP_INTROS = {
    "countries": ("Here are some facts about countries.", "Let us look at the map of the world."),
    "elements": ("Every chemical element has a symbol.", "Here are some chemical symbols."),
    "opposites": ("Many words have an opposite.", "Here are some pairs of opposites."),
    "animals": ("Here is something about animals.", "There is much to learn about animals."),
    "things": ("Everything has a color.", "Let us talk about colors."),
    "days": ("There are seven days in a week.", "Let us go through the week."),
    "months": ("There are twelve months in a year.", "Let us go through the year."),
    "planets": ("The planets go around the Sun.", "Let us talk about the planets."),
}
MIXED_INTROS = (
    "Here are some facts to remember.",
    "Did you know these things?",
    "There is something to learn every day.",
    "This is what the children learned on {day}.",
    "{name} wrote these sentences into a notebook.",
    "A clever {child} told us all this.",
)


def statements(rng: random.Random) -> str:
    """Facts, one sentence after another."""
    pairs = draw_facts(rng, rng.randint(4, 10), is_mixed=rng.random() < 0.3)
    sentences = [state(rng, r, e) for r, e in pairs]
    if rng.random() < 0.5:
        is_one_group = len({relation.group for relation, _ in pairs}) == 1
        intros = GROUP_INTROS[pairs[0][0].group] if is_one_group else MIXED_INTROS
        sentences.insert(0, Slots(rng).pick(intros))
    return " ".join(sentences)


LIST_TITLES = {
    "capital": ("Countries and their capitals", "Capitals of the world", "Capital cities"),
    "continent": ("Countries and where they are", "Countries by continent"),
    "symbol": ("Chemical elements and their symbols", "Chemical symbols"),
    "opposite": ("Words and their opposites", "Opposites"),
    "sound": ("Animals and their sounds", "Animal sounds"),
    "young": ("Animals and their young", "Names of young animals"),
    "home": ("Animals and their homes", "Where animals live"),
    "color": ("Things and their colors", "Colors of things"),
    "planet": ("Planets, counted from the Sun", "The planets and their places"),
}


def lists(rng: random.Random) -> str:
    """A list with a title: 'Peru: Lima', 'hot - cold'."""
    relation = rng.choices([RELATION[name] for name in LIST_TITLES], [RELATION[name].weight for name in LIST_TITLES])[0]
    count = min(rng.randint(6, 16), len(relation.facts))
    entities = rng.sample(list(relation.facts), count)
    mark, between = rng.choice(("", "- ", "* ")), rng.choice((": ", " - ", " = "))
    lines = [f"{mark}{entity}{between}{relation.facts[entity]}" for entity in entities]
    return rng.choice(LIST_TITLES[relation.name]) + ":\n" + "\n".join(lines)


COUNTRY_NOTES = (
    "Many people live in {capital}.",
    "Visitors to {country} often begin their trip in {capital}.",
    "On a map of {country}, a star marks {capital}.",
    "People come to {capital} from every part of {country}.",
    "{capital} is one of the best-known cities of {country}.",
    "School children in {country} learn a lot about {capital}.",
)
ELEMENT_NOTES = (
    "It is one of the chemical elements.",
    "It is not made of other elements.",
    "You can find {symbol} in the periodic table.",
    "In formulas it is written as {symbol}.",
    "{symbol} stands for it in every language.",
    "Everything is made of elements, and {element} is one of them.",
)


def article(rng: random.Random) -> str:
    """Short articles, as in an encyclopedia, about countries, elements or animals."""
    write, entities = rng.choice(
        (
            (_country_article, list(CONTINENTS)),
            (_element_article, list(ELEMENT_STATES)),
            (_animal_article, list(ANIMALS)),
        )
    )
    return "\n\n".join(write(rng, entity) for entity in rng.sample(entities, rng.randint(1, 3)))


def _country_article(rng: random.Random, country: str) -> str:
    slots = Slots(rng, country=country, capital=RELATION["capital"].facts[country])
    first = RELATION["continent"].statement(country)
    notes = [slots.fill(note) for note in rng.sample(COUNTRY_NOTES, rng.randint(1, 3))]
    named = rng.choice(
        ("Its capital is {capital}.", "Its capital city is {capital}.", "The capital of {country} is {capital}.")
    )
    return " ".join((first, slots.fill(named), *notes))


def _element_article(rng: random.Random, element: str) -> str:
    slots = Slots(rng, element=element, symbol=RELATION["symbol"].facts[element], state=ELEMENT_STATES[element])
    first = upper_first(slots.fill("{element} is a {state} at room temperature."))
    notes = [slots.fill(note) for note in rng.sample(ELEMENT_NOTES, rng.randint(1, 3))]
    return " ".join((first, RELATION["symbol"].fill(rng.choice(RELATION["symbol"].statements[:5]), element), *notes))


def _animal_article(rng: random.Random, animal: str) -> str:
    known = [RELATION[name] for name in ("sound", "young", "home") if animal in RELATION[name].facts]
    sentences = [relation.fill(rng.choice(relation.statements), animal) for relation in known]
    likes = (
        "Children like to draw {them}.",
        "There are many stories about {them}.",
        "Many people like to watch {them}.",
    )
    rng.shuffle(sentences)
    first = fix_articles(f"The {animal} is an animal.")
    return " ".join((first, *sentences, rng.choice(likes).format(them=plural(animal))))


def choices(rng: random.Random) -> str:
    """Questions that name a few answers to choose from."""
    sentences = []
    for relation, entity in draw_facts(rng, rng.randint(2, 5), is_mixed=True):
        answer = relation.facts[entity]
        others = [a for a in relation.answers if a not in (answer, entity)]
        options = rng.sample([answer, *rng.sample(others, 2)], 3)
        if relation.group == "animals":
            options = [fix_articles(f"a {option}") for option in options]
        question = relation.fill(rng.choice(relation.questions), entity)
        sentences.append(f"{question} Is it {options[0]}, {options[1]} or {options[2]}? {relation.statement(entity)}")
    return rng.choice((" ", "\n")).join(sentences)


def riddles(rng: random.Random) -> str:
    """What am I? The clues of a riddle fit one answer only."""
    kinds = (_animal_riddle, _country_riddle, _element_riddle, _opposite_riddle, _planet_riddle)
    drawn = [rng.choices(kinds, (4, 4, 2, 3, 1))[0](rng) for _ in range(rng.randint(2, 6))]
    return "\n\n".join(dict.fromkeys(drawn))


# Animals that no other animal equals in all that is told of them.
_RIDDLE_ANIMALS = [
    animal
    for animal, row in ANIMALS.items()
    if sum(all(x in ("-", y) for x, y in zip(row, other, strict=True)) for other in ANIMALS.values()) == 1
]


def _animal_riddle(rng: random.Random) -> str:
    animal = rng.choice(_RIDDLE_ANIMALS)
    forms = {"sound": "My sound is a {a}.", "young": "My young is called a {a}.", "home": "My home is a {a}."}
    clues = [form.format(a=RELATION[r].facts[animal]) for r, form in forms.items() if animal in RELATION[r].facts]
    rng.shuffle(clues)
    return fix_articles(f"I am an animal. {' '.join(clues)} What am I? I am a {animal}.")


def _country_riddle(rng: random.Random) -> str:
    country = rng.choice(list(CONTINENTS))
    clues = [f"I am in {CONTINENTS[country]}.", f"My capital is {RELATION['capital'].facts[country]}."]
    return f"I am a country. {' '.join(clues)} Which country am I? I am {country}."


def _element_riddle(rng: random.Random) -> str:
    element = rng.choice(list(ELEMENT_STATES))
    symbol = RELATION["symbol"].facts[element]
    return f"I am a chemical element. My symbol is {symbol}. Which element am I? I am {element}."


def _opposite_riddle(rng: random.Random) -> str:
    word, other = rng.choice(list(RELATION["opposite"].facts.items()))
    return f"I am a word. My opposite is {word}. Which word am I? I am {other}."


def _planet_riddle(rng: random.Random) -> str:
    planet, place = rng.choice(list(RELATION["planet"].facts.items()))
    return f"I am a planet. Counted from the Sun, I am the {place} one. Which planet am I? I am {planet}."


TALK_OPENINGS = (
    ("Good {daytime}, {name2}! How are you?", "Hello, {name}. I am {feeling}."),
    ("Hello, {name2}. Shall we {activity}?", "Yes, but first I want to {activity}."),
    ("Hi {name2}! What will you do on {day}?", "I will {activity} with my {relative}."),
    ("Hello! What is your favorite color?", "My favorite color is {color}."),
    ("Hi! What did you eat today?", "I ate {food} and drank some {drink}."),
    ("Good {daytime}! Where are you going?", "I am going to {place}."),
    ("{name2}, may I ask you something?", "Of course, {name}."),
)
TALK_CLOSINGS = (
    ("Thank you, you know a lot.", "You are welcome."),
    ("Thanks! I will tell my {relative2}.", "See you on {day}!"),
    ("Good. Let us go to {place2} now.", "Yes, I want to {activity} there."),
    ("Now I am {feeling}. Goodbye!", "Goodbye, {name}."),
    ("You are very clever.", "Thank you. I read a lot of books."),
)


def dialogue(rng: random.Random) -> str:
    """Two people talk: 'Anna: ...' 'Ben: ...'."""
    slots = Slots(rng)
    turns = [rng.choice(TALK_OPENINGS)] if rng.random() < 0.7 else []
    for relation, entity in draw_facts(rng, rng.randint(1, 4), is_mixed=True):
        asked = rng.choice(("", "", "", "Tell me: ", "Here is a question: ")) + relation.fill(
            rng.choice(relation.questions), entity
        )
        told = rng.choice(("", "", "", "That is easy. ", "I know that. ")) + reply(rng, relation, entity)
        turns.append((asked, told))
    if rng.random() < 0.6:
        turns.append(rng.choice(TALK_CLOSINGS))
    return "\n".join(
        slots.fill("{name}: ") + slots.fill(a) + "\n" + slots.fill("{name2}: ") + slots.fill(b) for a, b in turns
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, calendar, planets, letters


def sums(rng: random.Random) -> str:
    """Addition, subtraction, multiplication and division without remainder."""
    return rng.choice((" ", "\n")).join(_sum(rng) for _ in range(rng.randint(5, 14)))


def _sum(rng: random.Random) -> str:
    sign = rng.choices("+-*/", (4, 3, 2, 1))[0]
    top = 20 if rng.random() < 0.6 else 99
    a, b = rng.randint(1, top), rng.randint(1, top)
    if sign in "*/":
        a, b = rng.randint(2, 10), rng.randint(2, 10)
    a = a + b if sign == "-" else a * b if sign == "/" else a
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[sign]
    forms = (
        f"{a} {sign} {b} = {result}.",
        f"{a} {word} {b} is {result}.",
        f"What is {a} {sign} {b}? {a} {sign} {b} is {result}.",
        f"How much is {a} {word} {b}? It is {result}.",
    )
    return rng.choice(forms)


def equation(rng: random.Random) -> str:
    """'If 5*x + 3 = 13, then x is 2.', sometimes with the steps."""
    a, b, x = rng.randint(2, 6), rng.randint(1, 9), rng.randint(1, 6)
    c = a * x + b
    forms = (
        f"If {a}*x + {b} = {c}, then x is {x}.",
        f"If {a}*x + {b} = {c}, then {a}*x = {c - b}, and x is {x}.",
        f"What is x if {a}*x + {b} = {c}? Take away {b}: {a}*x = {c - b}. Divide by {a}: x is {x}.",
        f"If {a}*x = {a * x}, then x is {x}.",
        f"If x + {b} = {x + b}, then x is {x}.",
    )
    return rng.choices(forms, (6, 2, 1, 1, 1))[0]


def equations(rng: random.Random) -> str:
    """One-step and two-step linear equations."""
    return rng.choice((" ", "\n")).join(equation(rng) for _ in range(rng.randint(4, 12)))


CALENDAR_FORMS = {  # sentence -> how often
    "If yesterday was {last}, then tomorrow will be {next}.": 8,
    "If today is {today}, then tomorrow will be {next}.": 2,
    "If today is {today}, then yesterday was {last}.": 1,
    "If tomorrow will be {next}, then yesterday was {last}.": 1,
    "Two days after {last} comes {next}.": 2,
    "Between {last} and {next} comes {today}.": 1,
    "Today is {today}. Yesterday was {last}, and tomorrow will be {next}.": 1,
}
CALENDAR_LISTS = (
    "The days of the week are: " + ", ".join(DAYS) + ".",
    "The months of the year are: " + ", ".join(MONTHS) + ".",
    "A week has seven days.",
    "A year has twelve months.",
    "Saturday and Sunday are the weekend.",
    "The first month of the year is January, and the last one is December.",
)


def calendar(rng: random.Random) -> str:
    """Yesterday, today and tomorrow; the order of days and months."""
    sentences = [rng.choice(CALENDAR_LISTS)] if rng.random() < 0.4 else []
    for _ in range(rng.randint(3, 8)):
        if rng.random() < 0.85:
            i = rng.randrange(7)
            slots = {"last": DAYS[i - 1], "today": DAYS[i], "next": DAYS[(i + 1) % 7]}
            form = rng.choices(list(CALENDAR_FORMS), list(CALENDAR_FORMS.values()))[0]
            sentences.append(form.format(**slots))
        else:
            i = rng.randrange(12)
            sentences.append(f"{MONTHS[i]} is the {ORDINALS[i]} month of the year.")
    return rng.choice((" ", " ", "\n")).join(dict.fromkeys(sentences))


PLANET_LISTS = (
    "The planets of the solar system are: " + ", ".join(PLANETS) + ".",
    "The planets of the solar system are: " + ", ".join(PLANETS) + ".",
    "The eight planets, counted from the Sun, are " + ", ".join(PLANETS[:-1]) + " and " + PLANETS[-1] + ".",
    "What are the planets of the solar system? The planets of the solar system are: " + ", ".join(PLANETS) + ".",
)
PLANET_FACTS = (
    "Jupiter is the largest planet.",
    "Mercury is the smallest planet.",
    "Saturn is known for its bright rings.",
    "Mars is called the red planet.",
    "We live on Earth.",
    "Venus is the hottest planet.",
    "Neptune is the planet farthest from the Sun.",
    "Mercury is the planet nearest to the Sun.",
    "Earth has one moon.",
    "Mars has two moons.",
    "Venus has no moon.",
    "Jupiter is bigger than Saturn.",
    "Uranus and Neptune are very cold.",
    "The planets go around the Sun.",
    "The Sun is a star, not a planet.",
    "The Moon goes around Earth.",
    *(f"{a} is nearer to the Sun than {b}." for i, a in enumerate(PLANETS) for b in PLANETS[i + 1 :]),
    *(f"Going out from the Sun, the planet after {a} is {b}." for a, b in zip(PLANETS, PLANETS[1:], strict=False)),
)


def planets(rng: random.Random) -> str:
    """The planets, in order, and something about them."""
    sentences = rng.sample(PLANET_FACTS, rng.randint(3, 7))
    if rng.random() < 0.85:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(PLANET_LISTS))
    return " ".join(sentences)


SPELLED_WORDS = [word for word in word_list() if not is_test_word(word)]


def spelling(rng: random.Random) -> str:
    """How words are spelled, how long they are, how often a letter is in them. Test words are left out."""
    return rng.choice((" ", "\n")).join(_spelling(rng, word) for word in rng.sample(SPELLED_WORDS, rng.randint(3, 8)))


def _spelling(rng: random.Random, word: str) -> str:
    letter = rng.choice(word)
    count = word.count(letter)
    times = "once" if count == 1 else f"{count} times"
    forms = (
        f"The word {word} is spelled {'-'.join(word)}.",
        f"The word {word} is spelled {'-'.join(word)}.",
        f"How do you spell {word}? {upper_first(word)} is spelled {'-'.join(word)}.",
        f"{upper_first(word)} is spelled {'-'.join(word)}. It has {len(word)} letters.",
        f"The letters of {word} are {', '.join(word)}.",
        f"The word {word} begins with {word[0]} and ends with {word[-1]}: {'-'.join(word)}.",
        f"How many {letter} are in {word}? {'-'.join(word)}: the letter {letter} is there {times}.",
    )
    return rng.choice(forms)


# name -> (share of the documents, the function that writes one)
KINDS: dict[str, tuple[float, Callable[[random.Random], str]]] = {
    "questions": (30, questions),
    "statements": (13, statements),
    "lists": (5, lists),
    "article": (8, article),
    "choices": (3, choices),
    "riddles": (4, riddles),
    "counting_story": (7, counting_story),
    "finding_story": (3, finding_story),
    "fable": (2, fable),
    "journey": (3, journey),
    "dialogue": (5, dialogue),
    "favorites": (2, favorites),
    "sums": (4, sums),
    "equations": (4, equations),
    "calendar": (3, calendar),
    "planets": (2, planets),
    "spelling": (4, spelling),
}


def draw_document(rng: random.Random) -> tuple[str, str]:
    """(kind, text) of one document of MIN_CHARS to MAX_CHARS characters; consumes randomness of rng."""
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    while True:
        text = KINDS[kind][1](rng)
        if MIN_CHARS <= len(text) <= MAX_CHARS:
            return kind, text
