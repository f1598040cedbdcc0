"""Words of the pocket world: names, things to count, words to spell, and the little grammar that their forms need."""

import re
import zlib

GIRLS = """
Anna Emma Lily Mia Clara Nora Ella Lucy Ruth Sara Julia Maria Olivia Rosa Alice Grace Hannah Eva Ida Laura Molly
Paula Rita Tina Vera Wendy Zoe Amy Bella Carol Daisy Elsa Fiona Gina Helen Iris Jane Kate Linda Nina
""".split()
BOYS = """
Ben Tom Max Leo Sam Jack Paul Noah Oscar Peter David Felix Hugo Adam Carl Eric Finn Henry Ivan Luke Mark Nick Otto
Philip Ralph Simon Tim Victor Walter Alan Bruno Colin Dan Emil Frank George Harry Jim Karl Louis
""".split()
PEOPLE = GIRLS + BOYS
TEST_NAMES = GIRLS[-10:] + BOYS[-10:]  # word problems of the test split are about these people only
PRACTICE_NAMES = GIRLS[-20:-10] + BOYS[-20:-10]  # and those without a worked solution about these

THINGS = """
apple pear book pencil marble coin cookie stamp shell flower egg ball card button stone ticket candle cup spoon
plate orange carrot potato nut berry feather sticker toy kite hat sock ribbon bead postcard peach grape muffin
pancake crayon magnet balloon lantern basket brush bottle ring nail bolt rope tile mushroom radish melon walnut
pinecone pin bracelet puzzle poster photo comic badge bookmark ruler eraser notebook envelope napkin fork bowl mug
pillow blanket sandwich pretzel bagel bun biscuit candy cupcake
""".split()
CONTAINERS = "box bag basket jar drawer bucket tub chest tray crate sack case".split()

# Further words to spell, with the forms that regular grammar makes of them.
NOUNS = """
acrobat actor adventure airport alley anchor angel animal answer apron arm army arrow artist attic aunt author
autumn avenue baker bakery balcony band bank banner barber bargain barrel battle beach bean beard bed beetle bell
bench bicycle bird birthday blade blizzard blossom board boat bone bonfire boot border bow bracket brain branch
bread breakfast breath brick bridge brother bubble bud bull bundle bunk burger bus butcher cabbage cabin cable
cactus cage cake calendar camel camera camp canal candidate cannon canoe canvas cape captain caption car caravan
cardigan carnival carpenter carpet cart castle cave ceiling cellar center cereal chain chair chalk champion channel
chapter charm cheek cherry chimney chimpanzee chip church cinema circle city class clay clerk clock cloud clown
coast coat coconut code collar color column comb comet compass concert cookbook copper coral cord corner costume
cottage cotton couch country course court cousin cowboy crab cradle creek crew crisp crocus crossing crown cub cube
cucumber cupboard curb curl curtain cushion customer dairy dance danger daughter deck dentist desert desk detective
diamond dinner dinosaur dish district diver dock doctor doll dollar dome door dot dragon drawing dream dress drill
driver driveway drum dune dust eagle ear earring elbow elevator emperor engine entrance errand evening event exam
example exit eye face factory fairy falcon family fan farm farmer father feast fence festival fiddle fiddler field
film finger fire fist flag flame flood floor flour flute fog footstep forest fort fountain frame fridge friend frost
fruit furnace gallery garage garden garlic gate gem general ghost giant gift glass glove goal goat gown grain
grandfather grandmother granite grill grocer guard guest guide guitar gull gutter hairbrush hall hallway ham hammer
hand handle harbor harp harvest hawk head headline heart helmet herb hill hive holiday honey hook horn hospital host
hotel hour house hunter hut icicle idea igloo inch inn insect inventor iron island jacket jelly jewel jeweler jigsaw
journey judge juggler juice jungle kernel kettle key king kingdom kitchen knee knight label lace ladder lady lake
lamb lamp lane language laundry lawn lawyer leader league lemon lesson letter library lid lily line lizard lobster
locker log lord lotion lullaby lunch machine magazine magician mailbox mall mammal mane mansion maple marina market
mask master mat match maze meadow meal mechanic medal melody menu merchant message meteor microscope midnight mile
mill miner mint minute mirror mission mitten model moment monkey monster month moon mop morning moss mother motor
mountain mule muscle museum music mustard nap nation necklace needle neighbor nephew nest net newspaper nickel niece
night noon nose notch note novel nugget number nurse oak oar oat ocean office onion orchard orchestra ostrich outfit
oven owl owner paddle page pail painter palace palm pan panther paper parade parcel parent park party passage
passenger patch path pattern peacock pebble pelican penny peony people pepper perch petal phone picnic picture pie
pier pilot pine pipe pirate pitcher planet plank plant platform player plaza plum plumber pocket poem poet pole pond
pony popcorn porch port porter post pot potter powder prairie present prince princess printer prison prize puddle
pulley pump pumpkin pupil puppet purse quarter queen question quilt raccoon radio raft rail rain rainbow raincoat
raisin rake ranch ranger raven razor recipe record referee region report rescue restaurant reward rhyme rib riddle
rider rink river riverbank road roast robin robot rocker rocket roof room rooster root rose route row rug runner
saddle sail sailor salad salt sand sandal satchel sauce saucer scale scarf scene school scientist scooter scout
screen sculptor sea seal season seat secret seed shadow shark shed sheet shepherd shield ship shirt shoe shop shore
shoulder shovel shower shuttle sidewalk sign silk singer sink sister skate skater sketch skill skirt sky sleeve
slide slipper smile smoke snack snail snowflake soap sofa soil soldier song soup sparrow spear spice sponge spring
squash squid stage stair staircase stall star station statue steam stem stick stool storm stove stranger straw
strawberry stream street string student studio suitcase summit sun sunset supper surface swamp swan sweater switch
sword table tablet tail tailor tale tape task taxi teacher team teapot tear telescope temple tenant tent term
theater thread throne thumb thunder tiger timber toast toaster toe tongue tool torch tourist towel tower town track
tractor trail train trap travel traveler treasure tree trick trophy truck trumpet trunk tub tulip tune tunnel turnip
turtle twig twin typist umbrella uncle valet valley van vase vegetable vest view village villain vine vineyard
violin visitor voice wagon waiter wall wallet warehouse watch water wave weather wedding weed week well whale wheat
wheel whistle widow wig willow window wing winner winter wire witch witness wizard woodland woodpecker wool word
worker world wreath wrist writer yard yarn year zebra zipper
""".split()
VERBS = """
accept admire adopt allow amuse answer appear arrange arrive ask attach attack attend avoid bake balance bark
believe belong bless blink boast boil book borrow bounce bow brush build burn bury call camp cancel carry carve
cause challenge change charge chase check cheer chew claim clean climb close collapse collect color comb comfort
command complain complete connect consider consist contain continue cook copy cough count cover crash crawl create
cross cure damage dance dare decide decorate delay deliver depend describe deserve destroy develop disappear
discover dodge doubt drain dream dress dust earn educate employ empty encourage enjoy escape examine excuse exercise
exist expand expect explain explode express fade fail fasten fear fetch fill film finish fix flash float flow fold
follow force form frame frighten gather gaze glow grate greet guard guess guide hammer hand handle happen harm hatch
haunt heat help hope hover hunt imagine improve include inform injure interest introduce invent invite itch join
joke judge jump kick kiss knock land last laugh launch learn lick lift like listen load lock look love mail manage
march mark marry measure melt memorize mend milk miss mix moan mourn move multiply name need nest note notice number
obey object observe offend offer open order own pack paint park part pass pause peel perform phone pick place plant
play please point polish pour practice press pretend prevent print produce promise protect provide pull pump punch
punish push question race rain raise rattle reach realize receive record reduce reflect refuse rejoice relax release
remain remember remove repair repeat reply report request respect rest result return rinse risk roar roll row rule
rush sack sail save scare scatter scold scrape scratch scream screw seal search seem serve settle shade share
shelter shock shout sigh sketch slice slow smell smile smoke snatch sneeze sniff snore snow soak solve sort sound
spark spell spill splash spoil sprinkle squeeze stain stamp stare start stay steer store strengthen stretch study
suggest suit supply support suppose surprise suspect switch talk tame taste tease tempt terrify test thank tickle
touch tour tow trace trade train travel treat tremble trick trust turn twist type unite use value vanish visit wait
walk wander warm warn wash waste watch water wave weigh welcome whirl whisper wink wipe wish wonder work wreck
wrestle yawn yell
""".split()
ADJECTIVES = """
able active alert amazing ample awful awkward bitter blank blind blunt bold brave bright bumpy busy calm careful
cheap cheerful chilly civil clean clear clever clumsy cold common cool cosy crisp cruel curious dainty damp dark
dear deep dense dizzy dull dusty eager easy elegant empty even exact faint fair faithful famous fancy fatal fierce
final fine firm flat fluent foolish formal frank free frequent fresh full funny fuzzy general gentle glad gloomy
golden graceful grand grateful grave great green grumpy handsome happy hard harsh hasty healthy heavy helpful hollow
honest humble icy ideal jolly joyful just keen kind large late lazy lean legal level light likely lively local
lonely loose loud loyal lucky mad magic main mean merry mighty mild modern modest muddy mute narrow nasty natural
neat nervous new nice noble noisy normal odd orderly painful pale patient peaceful perfect plain pleasant plump
polite poor positive precise pretty prickly private prompt proud pure quaint quick quiet random rapid rare ready
real regular remote rich ripe rough royal rude sad safe salty scary secret selfish sensible serious severe shallow
sharp shiny shy silent silly similar simple single skinny sleepy slim slippery slow smart smooth soft soggy solid
sore sour special spicy square steady steep stiff stormy strange strict strong stubborn sudden sunny sweet swift
tall tender thick thirsty thorough tidy tight tiny tired tough usual vague valuable vast vital vivid warm weak weary
wet wicked wide wild windy wise wonderful worthy young
""".split()


_UNCOUNTED = """
music weather water people honey bread cotton rain thunder supper moss wheat wool dust popcorn garlic laundry salt
silk soil fog frost smoke steam timber mustard flour juice jelly travel sand
""".split()
_WITHOUT_ADVERB = """
tall dull full likely magic orderly prickly skinny young tiny tired green
""".split()


def _verb_forms(verb: str) -> list[str]:
    stem = verb[:-1] if verb.endswith("e") else verb
    past = verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else stem + "ed"
    return [verb, plural(verb), *(() if verb == "build" else (past,)), stem + "ing"]


def _adverb(adjective: str) -> str:
    if adjective.endswith("le"):
        return adjective[:-1] + "y"
    if adjective.endswith("y") and adjective != "shy":
        return adjective[:-1] + "ily"
    return adjective + "ly"


def listed_words() -> list[str]:
    """All nouns, verbs and adjectives of the lists above with their forms, unsorted, some of them twice."""
    words = [form for noun in (*NOUNS, *THINGS, *CONTAINERS) for form in (noun, plural(noun)) if noun not in _UNCOUNTED]
    words += [form for verb in VERBS for form in _verb_forms(verb)]
    adverbs = [_adverb(adjective) for adjective in ADJECTIVES if adjective not in _WITHOUT_ADVERB]
    return [*words, *ADJECTIVES, *adverbs, *_UNCOUNTED]


def is_test_word(word: str) -> bool:
    """Whether the spelling of a word is kept for tests: no pretraining text spells it out (about one word in eight)."""
    return zlib.crc32(word.encode()) % 8 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

_PLURALS = {
    "sheep": "sheep", "deer": "deer", "wolf": "wolves", "mouse": "mice", "goose": "geese", "potato": "potatoes",
}  # fmt: skip


def upper_first(text: str) -> str:
    """'the Netherlands' -> 'The Netherlands'."""
    return text[:1].upper() + text[1:]


def fix_articles(text: str) -> str:
    """'a owl and a unit' -> 'an owl and a unit'."""
    return re.sub(r"\b([Aa]) (?=[aeiou])(?!uni|us[eu]|eu|one\b)", r"\1n ", text)


def plural(noun: str) -> str:
    """'fox' -> 'foxes', 'berry' -> 'berries', 'mouse' -> 'mice'."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"
