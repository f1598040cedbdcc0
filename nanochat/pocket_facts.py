"""What is true in the pocket world: facts with the sentences that state them and the questions that ask for them.

A Relation is one kind of fact ("capital": Peru -> Lima) with its phrasings. Pretraining text, evaluation items, chat
and task data are all made from this one table, so that a test item is always answerable from the text.

The facts are true of the real world; where sources disagree (a country with two capitals, a country on two continents)
the entry is left out. Names are written in plain ASCII, spelling is American. This module holds no randomness.
"""

import functools
import re
from dataclasses import dataclass
from functools import cached_property

from nanochat.pocket_words import fix_articles, listed_words, plural, upper_first


def _lines(text: str) -> list[tuple[str, dict[str, str]]]:
    """'Africa: Egypt=Cairo, Kenya=Nairobi' -> [('Africa', {'Egypt': 'Cairo', 'Kenya': 'Nairobi'})], a line each."""
    table = []
    for line in text.strip().splitlines():
        head, _, rest = line.partition(":")
        table.append((head.strip(), dict(pair.strip().split("=") for pair in rest.split(","))))
    return table


# "-" stands for the countries on two continents: their capital is told, their continent is not.
_COUNTRIES = _lines("""
Africa: Algeria=Algiers, Angola=Luanda, Benin=Porto-Novo, Botswana=Gaborone, Burkina Faso=Ouagadougou, Burundi=Gitega
Africa: Cameroon=Yaounde, Cape Verde=Praia, the Central African Republic=Bangui, Chad=N'Djamena, Eritrea=Asmara
Africa: Ethiopia=Addis Ababa, Gabon=Libreville, the Gambia=Banjul, Ghana=Accra, Guinea=Conakry, Kenya=Nairobi
Africa: Ivory Coast=Yamoussoukro, Lesotho=Maseru, Liberia=Monrovia, Libya=Tripoli, Madagascar=Antananarivo
Africa: Malawi=Lilongwe, Mali=Bamako, Mauritania=Nouakchott, Mauritius=Port Louis, Morocco=Rabat, Mozambique=Maputo
Africa: Namibia=Windhoek, Niger=Niamey, Nigeria=Abuja, Rwanda=Kigali, Senegal=Dakar, Sierra Leone=Freetown
Africa: Somalia=Mogadishu, Sudan=Khartoum, Tanzania=Dodoma, Togo=Lome, Tunisia=Tunis, Uganda=Kampala, Zambia=Lusaka
Africa: Zimbabwe=Harare
Asia: Afghanistan=Kabul, Bahrain=Manama, Bangladesh=Dhaka, Bhutan=Thimphu, Brunei=Bandar Seri Begawan, China=Beijing
Asia: Cambodia=Phnom Penh, East Timor=Dili, India=New Delhi, Indonesia=Jakarta, Iran=Tehran, Iraq=Baghdad, Japan=Tokyo
Asia: Jordan=Amman, Kuwait=Kuwait City, Kyrgyzstan=Bishkek, Laos=Vientiane, Lebanon=Beirut, Malaysia=Kuala Lumpur
Asia: Mongolia=Ulaanbaatar, Myanmar=Naypyidaw, Nepal=Kathmandu, North Korea=Pyongyang, Oman=Muscat, Pakistan=Islamabad
Asia: the Philippines=Manila, Qatar=Doha, Saudi Arabia=Riyadh, South Korea=Seoul, Syria=Damascus, Tajikistan=Dushanbe
Asia: Thailand=Bangkok, Turkmenistan=Ashgabat, the United Arab Emirates=Abu Dhabi, Uzbekistan=Tashkent, Vietnam=Hanoi
Europe: Albania=Tirana, Andorra=Andorra la Vella, Austria=Vienna, Belarus=Minsk, Belgium=Brussels, Bulgaria=Sofia
Europe: Bosnia and Herzegovina=Sarajevo, Croatia=Zagreb, the Czech Republic=Prague, Denmark=Copenhagen, Estonia=Tallinn
Europe: Finland=Helsinki, France=Paris, Germany=Berlin, Greece=Athens, Hungary=Budapest, Iceland=Reykjavik
Europe: Ireland=Dublin, Italy=Rome, Latvia=Riga, Liechtenstein=Vaduz, Lithuania=Vilnius, Malta=Valletta
Europe: Moldova=Chisinau, Montenegro=Podgorica, the Netherlands=Amsterdam, North Macedonia=Skopje, Norway=Oslo
Europe: Poland=Warsaw, Portugal=Lisbon, Romania=Bucharest, Serbia=Belgrade, Slovakia=Bratislava, Slovenia=Ljubljana
Europe: Spain=Madrid, Sweden=Stockholm, Switzerland=Bern, Ukraine=Kyiv, the United Kingdom=London
North America: the Bahamas=Nassau, Barbados=Bridgetown, Belize=Belmopan, Canada=Ottawa, Costa Rica=San Jose, Cuba=Havana
North America: the Dominican Republic=Santo Domingo, El Salvador=San Salvador, Guatemala=Guatemala City
North America: Haiti=Port-au-Prince, Honduras=Tegucigalpa, Jamaica=Kingston, Mexico=Mexico City
North America: Nicaragua=Managua, Panama=Panama City
North America: Saint Lucia=Castries, Trinidad and Tobago=Port of Spain, the United States=Washington
South America: Argentina=Buenos Aires, Brazil=Brasilia, Chile=Santiago, Colombia=Bogota, Ecuador=Quito
South America: Guyana=Georgetown, Paraguay=Asuncion, Peru=Lima, Suriname=Paramaribo, Uruguay=Montevideo
South America: Venezuela=Caracas
Oceania: Australia=Canberra, Fiji=Suva, New Zealand=Wellington, Samoa=Apia, Vanuatu=Port Vila
-: Armenia=Yerevan, Azerbaijan=Baku, Cyprus=Nicosia, Georgia=Tbilisi, Kazakhstan=Astana, Russia=Moscow, Turkey=Ankara
-: Egypt=Cairo
""")

_ELEMENTS = _lines("""
gas: hydrogen=H, helium=He, nitrogen=N, oxygen=O, fluorine=F, neon=Ne, chlorine=Cl, argon=Ar, krypton=Kr, xenon=Xe
gas: radon=Rn
liquid: bromine=Br, mercury=Hg
solid: lithium=Li, beryllium=Be, boron=B, carbon=C, sodium=Na, magnesium=Mg, aluminum=Al, silicon=Si, phosphorus=P
solid: sulfur=S, potassium=K, calcium=Ca, scandium=Sc, titanium=Ti, vanadium=V, chromium=Cr, manganese=Mn, iron=Fe
solid: cobalt=Co, nickel=Ni, copper=Cu, zinc=Zn, gallium=Ga, germanium=Ge, arsenic=As, selenium=Se, rubidium=Rb
solid: strontium=Sr, yttrium=Y, zirconium=Zr, niobium=Nb, molybdenum=Mo, ruthenium=Ru, rhodium=Rh, palladium=Pd
solid: silver=Ag, cadmium=Cd, tin=Sn, antimony=Sb, tellurium=Te, iodine=I, cesium=Cs, barium=Ba, tungsten=W
solid: osmium=Os, iridium=Ir, platinum=Pt, gold=Au, thallium=Tl, lead=Pb, bismuth=Bi, polonium=Po, radium=Ra
solid: thorium=Th, uranium=U, plutonium=Pu, lanthanum=La, cerium=Ce, rhenium=Re, hafnium=Hf, tantalum=Ta
""")

OPPOSITE_PAIRS = [
    tuple(pair.split("-"))
    for pair in """
hot-cold big-small tall-short fast-slow happy-sad light-dark wet-dry full-empty open-closed hard-soft strong-weak
rich-poor young-old up-down left-right day-night black-white good-bad early-late high-low near-far thick-thin
wide-narrow deep-shallow loud-quiet clean-dirty sweet-sour smooth-rough sharp-blunt tight-loose brave-cowardly
cheap-expensive easy-difficult safe-dangerous true-false first-last begin-end buy-sell give-take push-pull win-lose
laugh-cry love-hate come-go rise-fall float-sink remember-forget ask-answer arrive-depart build-destroy accept-refuse
attack-defend friend-enemy north-south east-west top-bottom front-back inside-outside summer-winter war-peace life-death
success-failure victory-defeat profit-loss asleep-awake alive-dead absent-present ancient-modern polite-rude
generous-stingy humble-proud guilty-innocent public-private simple-complex temporary-permanent maximum-minimum
increase-decrease always-never everything-nothing more-less above-below before-after over-under forward-backward
positive-negative odd-even same-different straight-crooked possible-impossible tame-wild fresh-stale raw-cooked
expand-shrink freeze-melt sunrise-sunset heaven-hell hero-villain lock-unlock praise-blame beautiful-ugly
""".split()
]

# animal: sound, name of the young, home; "-" where there is no well-known word.
ANIMALS = {
    name: tuple(rest.split())
    for name, _, rest in (
        entry.strip().partition(" ")
        for entry in """
dog bark puppy kennel, cat meow kitten -, cow moo calf barn, horse neigh foal stable, sheep bleat lamb -, pig oink
piglet sty, goat bleat kid -, duck quack duckling -, hen cluck chick coop, lion roar cub -, tiger roar cub -, bear
growl cub den, wolf howl pup den, fox - kit den, frog croak tadpole pond, bee buzz larva hive, sparrow chirp - nest,
owl hoot owlet -, mouse squeak - hole, rabbit - kit burrow, snake hiss - -, elephant trumpet calf -, donkey bray
foal stable, goose honk gosling -, swan - cygnet -, deer - fawn forest, kangaroo - joey -, spider - spiderling web,
ant - - anthill, beaver - kit lodge, eagle - eaglet nest, pigeon coo squab -, crow caw - nest, parrot squawk - -,
butterfly - caterpillar -, hare - leveret -, squirrel - kit drey, hedgehog - hoglet -, mole - - burrow, badger - cub
sett, otter - pup holt, seal bark pup -, whale - calf -, giraffe - calf -, zebra - foal -, penguin - chick -, eel -
elver -, cricket chirp - -, bat squeak pup cave, termite - - mound, wasp buzz larva nest, moth - caterpillar -, toad
croak tadpole -, panda - cub -
""".replace("\n", " ").split(",")
    )
}

_COLORS = _lines("""
red: a ripe tomato=, a strawberry=, a cherry=, a ruby=, blood=, a fire truck=, a stop sign=, a brick=, a raspberry=
red: a ladybug=
green: grass=, a cucumber=, spinach=, an emerald=, a lime=, broccoli=, parsley=, celery=, lettuce=, a pea=, jade=, moss=
white: snow=, milk=, salt=, sugar=, chalk=, flour=, cotton=, a polar bear=, a snowman=, a daisy petal=
black: coal=, soot=, tar=, a raven=, a panther=, licorice=
yellow: a lemon=, a banana=, butter=, a sunflower=, a canary=, a dandelion=, a school bus=, corn=, mustard=
orange: a carrot=, a pumpkin=, a mandarin=, an apricot=, a basketball=
blue: the sky=, a sapphire=, a blueberry=, the ocean=, a cornflower=
brown: chocolate=, mud=, coffee=, cinnamon=, tree bark=, a chestnut=, toast=, an acorn=
purple: a plum=, an eggplant=, lavender=, an amethyst=
pink: a flamingo=, bubble gum=, salmon meat=
gray: ash=, a rain cloud=, concrete=, a pebble=
""")

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()

CONTINENTS = {country: place for place, row in _COUNTRIES if place != "-" for country in row}
ELEMENT_STATES = {element: state for state, row in _ELEMENTS for element in row}
COLORS = sorted({color for color, _ in _COLORS})

# Symbols that are English words cannot be told from the word in a reply: these elements are taught but not tested.
_WORDLIKE_SYMBOLS = ("He", "Be", "As", "I", "La", "Ta")


@dataclass(frozen=True, eq=False)
class Relation:
    """One kind of fact.

    In the phrasings {e} is the entity, {a} the answer, {E} and {A} the same with a capital first letter, {es} and {Es}
    the plural of the entity; "a" is corrected to "an" afterwards. The first statement is the plain one: it names the
    entity before the answer and ends in the answer.
    """

    name: str
    group: str  # relations of one group share their entities, and which of these are held out
    facts: dict[str, str]  # entity -> answer
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    weight: int  # how often the text speaks of this relation, against the others

    @cached_property
    def answers(self) -> list[str]:
        return sorted(set(self.facts.values()))

    def fill(self, template: str, entity: str) -> str:
        """The phrasing about one entity: fill('What is a baby {e} called?', 'dog') -> 'What is a baby dog called?'."""
        answer = self.facts[entity]
        es = plural(entity)
        text = template.format(
            e=entity, a=answer, E=upper_first(entity), A=upper_first(answer), es=es, Es=upper_first(es)
        )
        return fix_articles(text)

    def statement(self, entity: str) -> str:
        """The plain statement: 'The capital of Peru is Lima.'"""
        return self.fill(self.statements[0], entity)


def bare(entity: str) -> str:
    """'the Netherlands' -> 'Netherlands': an entity without its article."""
    return re.sub(r"^(the|an?) ", "", entity)


def mentions(words: list[str]) -> re.Pattern[str]:
    """A pattern that finds any of the words as a whole word, in upper or lower case."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)


def _animal_facts(column: int) -> dict[str, str]:
    return {animal: row[column] for animal, row in ANIMALS.items() if row[column] != "-"}


def _next(cycle: list[str], step: int) -> dict[str, str]:
    return {item: cycle[(i + step) % len(cycle)] for i, item in enumerate(cycle)}


RELATIONS = [
    Relation(
        "capital",
        "countries",
        {country: city for _, row in _COUNTRIES for country, city in row.items()},
        (
            "The capital of {e} is {a}.",
            "{A} is the capital of {e}.",
            "The capital city of {e} is {a}.",
            "{A} is the capital city of {e}.",
            "If you want to see the capital of {e}, you have to go to {a}.",
            "In {e}, the capital is called {a}.",
        ),
        (
            "What is the capital of {e}?",
            "Which city is the capital of {e}?",
            "What is the capital city of {e}?",
            "Can you name the capital of {e}?",
            "Do you know the capital of {e}?",
            "What is the name of the capital of {e}?",
        ),
        weight=34,
    ),
    Relation(
        "continent",
        "countries",
        CONTINENTS,
        (
            "{E} is a country in {a}.",
            "{E} is in {a}.",
            "{E} is part of {a}.",
            "You will find {e} on a map of {a}.",
            "One of the countries in {a} is {e}.",
        ),
        (
            "Which continent is {e} in?",
            "What continent is {e} part of?",
            "On which continent is {e}?",
            "In what part of the world is {e}?",
        ),
        weight=22,
    ),
    Relation(
        "symbol",
        "elements",
        {element: symbol for _, row in _ELEMENTS for element, symbol in row.items()},
        (
            "The chemical symbol of {e} is {a}.",
            "The symbol for {e} is {a}.",
            "{A} is the chemical symbol of {e}.",
            "The chemical symbol for {e} is {a}.",
            "The element {e} has the symbol {a}.",
            "In chemistry, {e} is written as {a}.",
            "Chemists write {a} when they mean {e}.",
        ),
        (
            "What is the chemical symbol of {e}?",
            "What is the symbol for {e}?",
            "What is the chemical symbol for {e}?",
            "Which symbol stands for {e}?",
            "How do chemists write {e}?",
            "Which symbol does the element {e} have?",
        ),
        weight=16,
    ),
    Relation(
        "opposite",
        "opposites",
        {word: other for x, y in OPPOSITE_PAIRS for word, other in ((x, y), (y, x))},
        (
            "The opposite of {e} is {a}.",
            "{E} is the opposite of {a}.",
            "The opposite of the word {e} is {a}.",
            "{E} and {a} are opposites.",
            "The word {e} means the opposite of {a}.",
            "The words {e} and {a} have opposite meanings.",
        ),
        (
            "What is the opposite of {e}?",
            "Which word is the opposite of {e}?",
            "What is the opposite of the word {e}?",
            "What word means the opposite of {e}?",
            "Can you tell me the opposite of {e}?",
        ),
        weight=30,
    ),
    Relation(
        "sound",
        "animals",
        _animal_facts(0),
        (
            "The sound of a {e} is a {a}.",
            "The sound that {es} make is called a {a}.",
            "A {a} is the sound of a {e}.",
            "{Es} {a}.",
            "You can hear a {e} {a}.",
            "When a {e} calls, you hear a {a}.",
        ),
        (
            "What is the sound of a {e}?",
            "What sound does a {e} make?",
            "What is the sound of {es} called?",
            "Which sound do {es} make?",
        ),
        weight=6,
    ),
    Relation(
        "young",
        "animals",
        _animal_facts(1),
        (
            "A young {e} is called a {a}.",
            "A baby {e} is called a {a}.",
            "The young of a {e} is called a {a}.",
            "A {a} is a young {e}.",
            "Every {e} was once a {a}.",
        ),
        (
            "What is a young {e} called?",
            "What is a baby {e} called?",
            "What do you call a young {e}?",
            "What is the young of a {e} called?",
            "What is the name for a young {e}?",
        ),
        weight=9,
    ),
    Relation(
        "home",
        "animals",
        _animal_facts(2),
        (
            "The home of a {e} is a {a}.",
            "A {e} lives in a {a}.",
            "{Es} live in a {a}.",
            "If you look into a {a}, you may find a {e}.",
        ),
        (
            "What is the home of a {e}?",
            "Where does a {e} live?",
            "Where do {es} live?",
            "In what kind of home does a {e} live?",
        ),
        weight=6,
    ),
    Relation(
        "color",
        "things",
        {thing: color for color, row in _COLORS for thing in row},
        (
            "The color of {e} is {a}.",
            "{E} is {a}.",
            "The usual color of {e} is {a}.",
            "If you paint a picture of {e}, you need {a} paint.",
        ),
        (
            "What is the color of {e}?",
            "What color is {e}?",
            "Which color does {e} have?",
            "Can you tell me the color of {e}?",
        ),
        weight=12,
    ),
    Relation(
        "day after",
        "days",
        _next(DAYS, 1),
        ("The day after {e} is {a}.", "{A} comes after {e}.", "After {e} comes {a}.", "{A} follows {e}."),
        ("What is the day after {e}?", "What day comes after {e}?", "Which day follows {e}?"),
        weight=4,
    ),
    Relation(
        "day before",
        "days",
        _next(DAYS, -1),
        ("The day before {e} is {a}.", "{A} comes before {e}.", "Just before {e} comes {a}."),
        ("What is the day before {e}?", "What day comes before {e}?", "Which day comes just before {e}?"),
        weight=4,
    ),
    Relation(
        "month after",
        "months",
        _next(MONTHS, 1),
        ("The month after {e} is {a}.", "{A} comes after {e}.", "After {e} comes {a}.", "{A} follows {e}."),
        ("What is the month after {e}?", "What month comes after {e}?", "Which month follows {e}?"),
        weight=4,
    ),
    Relation(
        "month before",
        "months",
        _next(MONTHS, -1),
        ("The month before {e} is {a}.", "{A} comes before {e}.", "Just before {e} comes {a}."),
        ("What is the month before {e}?", "What month comes before {e}?", "Which month comes just before {e}?"),
        weight=4,
    ),
    Relation(
        "planet",
        "planets",
        dict(zip(PLANETS, ORDINALS, strict=False)),
        (
            "Counted from the Sun, the place of {e} is {a}.",
            "{E} is the {a} planet from the Sun.",
            "The {a} planet from the Sun is {e}.",
            "Counted from the Sun, {e} is the {a} planet.",
        ),
        (
            "Counted from the Sun, what is the place of {e}?",
            "Counted from the Sun, what number is {e}?",
            "What place does {e} have among the planets?",
        ),
        weight=3,
    ),
]
RELATION = {relation.name: relation for relation in RELATIONS}

# Words that ordinary questions need ("What color is ...", "What comes after ..."), and entities that share their name
# with another: chat cannot avoid them, so they are never held out.
_NEVER_HELD_OUT = set(
    """day night before after young old good bad more less up down first last same different give take over under always
    never open closed ask answer begin end come go left right big small friend enemy easy difficult true false
    mercury Mercury Earth one hard soft everything nothing happy sad present absent top bottom odd even short tall
    above below love hate early late public private light dark""".split()
) | {element for element, symbol in RELATION["symbol"].facts.items() if symbol in _WORDLIKE_SYMBOLS}


def entities_of(group: str) -> list[str]:
    """All entities of a group, in the order of the tables."""
    return list(dict.fromkeys(e for relation in RELATIONS if relation.group == group for e in relation.facts))


@functools.cache
def _names_within_names() -> set[str]:
    """Entities that are part of another one's name: 'east' of East Timor, 'bear' of a polar bear."""
    names = {bare(entity).lower() for relation in RELATIONS for entity in relation.facts}
    longer = [name.split() for name in names if " " in name]
    return {name for name in names if any(name in words for words in longer)}


def may_be_held_out(entity: str) -> bool:
    """Whether chat can do without naming the entity."""
    return entity not in _NEVER_HELD_OUT and bare(entity).lower() not in _names_within_names()


def is_wordlike(answer: str) -> bool:
    """Whether an answer is also an ordinary English word ('I' for iodine) and so cannot be looked for in a reply."""
    return answer in _WORDLIKE_SYMBOLS


def word_list() -> list[str]:
    """The words to spell: lower-case English words of at least three letters, in alphabetical order."""
    words = [*listed_words(), *ANIMALS, *(word for row in ANIMALS.values() for word in row), *COLORS, *ORDINALS]
    for name in ("symbol", "opposite", "color"):
        words += [part for entity in RELATION[name].facts for part in bare(entity).split()]
    return sorted({word for word in words if re.fullmatch(r"[a-z]{3,}", word)})
