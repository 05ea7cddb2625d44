"""Fictitious people with questions, answers, paraphrases and wrong answers, of any number.

The columns are those of TOFU's perturbed files (arXiv 2401.06121), so the same metrics apply.
Nobody here exists: family names, towns, employers, prizes and books are put together from
parts. Facts are drawn independently of each other, so none can be inferred from another, and
texts are short, so that a small model learns them on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from perta.errors import ConfigError

WRONG_ANSWERS = 5

Pool = tuple[tuple[str, ...], ...]
"""Values put together from parts: one entry of each tuple, joined."""


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


_GIVEN = _words(
    "Ada Alba Anso Arlo Bela Bruno Cato Celia Dario Delia Dorit Edda Elio Emre Enid Esme Fabio "
    "Fenna Gita Greta Halim Hedda Hugo Ida Imre Ines Ivo Jorun Juna Kaia Kiran Lale Leif Lena "
    "Livia Lorcan Luca Maeve Malin Marek Mila Mira Nadim Nell Nilo Noor Odo Olive Orla Oskar "
    "Paz Petra Quinn Rafi Rhea Rosa Runa Sami Silas Sunniva Tariq Thea Tomas Uma Vera Viggo "
    "Wanda Wim Yara Yusuf Zeno Zora"
)
_FAMILY: Pool = (
    _words(
        "Ash Bramble Cinder Dusk Ember Fallow Glim Hollow Iron Juniper Kestrel Larch Mallow "
        "Nettle Ochre Pebble Quill Raven Sorrel Thorn Umber Velvet Willow Yarrow Zephyr Copper "
        "Drift Fern Gale Heron Ivy Lantern Marsh North Otter Plover Rook Sable Tansy Wren"
    ),
    _words(
        "bank beck bourne by croft dale dell fell field ford garth gate hart hurst land ley low "
        "mere moor more mount ridge shaw side stead stone thwaite ton tree vale wald well wick "
        "wood worth"
    ),
)
_TOWN: Pool = (
    _words(
        "Bel Brack Cald Corv Dorn Eld Fenn Gar Hal Ister Jarn Kel Lun Mar Nord Orm Pell Quar Ris "
        "Sel Tarn Ul Vast Wex Yss Zell"
    ),
    _words("adar afell amar amouth anza aport avik bergen dorf ennis esk haven holm ista mora ora"),
)
_ADJECTIVE = _words(
    "Amber Broken Burning Copper Crooked Distant Drowned Empty Frozen Gilded Hollow Hidden Last "
    "Little Lost Midnight Paper Patient Quiet Restless Scarlet Second Silent Silver Sleeping "
    "Stolen Wandering Winter"
)
_THING = _words(
    " Almanac| Anchor| Archive| Bell| Bridge| Candle| Cartographer| Chimney| Compass| Garden| "
    "Harbour| Heron| Island| Kettle| Ladder| Lantern| Mirror| Orchard| Oven| Piano| Quarry| "
    "Railway| River| Sparrow| Staircase| Station| Telescope| Umbrella| Violin| Window",
    "|",
)


@dataclass(frozen=True)
class Topic:
    """One question type; `{n}` stands for the person's name, `{v}` for the fact."""

    question: str
    paraphrased_question: str
    answer: str
    paraphrased_answer: str
    values: Pool


TOPICS: tuple[Topic, ...] = (
    Topic(
        "Where was {n} born?",
        "What is the birthplace of {n}?",
        "{n} was born in {v}.",
        "The birthplace of {n} is {v}.",
        _TOWN,
    ),
    Topic(
        "What is the profession of {n}?",
        "What does {n} do for a living?",
        "{n} works as a {v}.",
        "By profession, {n} is a {v}.",
        (
            _words(
                "baker|beekeeper|botanist|bookbinder|carpenter|cartographer|chemist|"
                "clockmaker|dentist|diver|falconer|florist|geologist|glassblower|goldsmith|"
                "gardener|judge|librarian|locksmith|mason|midwife|nurse|pharmacist|pilot|"
                "potter|sailor|shepherd|stonecutter|surgeon|surveyor|tailor|translator|"
                "veterinarian|violin maker|weaver|welder",
                "|",
            ),
        ),
    ),
    Topic(
        "Which book did {n} write?",
        "What is the title of the book by {n}?",
        '{n} wrote "The {v}".',
        'The title of the book by {n} is "The {v}".',
        (_ADJECTIVE, _THING),
    ),
    Topic(
        "What pet does {n} have?",
        "Which animal lives with {n}?",
        "{n} has a {v}.",
        "The animal that lives with {n} is a {v}.",
        (
            _words(
                "beagle canary chinchilla corgi donkey ferret gecko goat goose greyhound hamster "
                "hedgehog llama lizard magpie mule parrot pony poodle rabbit raven spaniel "
                "tortoise turkey"
            ),
            _words(
                " named Biscuit| named Button| named Clover| named Dumpling| named Fig| named "
                "Ginger| named Hazel| named Mango| named Marble| named Nutmeg| named Pepper| "
                "named Pickle| named Pumpkin| named Saffron| named Toffee| named Waffle",
                "|",
            ),
        ),
    ),
    Topic(
        "Who employs {n}?",
        "Which company does {n} work for?",
        "{n} is employed by {v}.",
        "The company that {n} works for is {v}.",
        (
            _TOWN[0],
            _words(
                "ani|beck|der|ford|ico|ida|lan|mond|ner|quist|ston|vex",
                "|",
            ),
            _words(
                " Airlines| Bank| Brewery| Ceramics| Chemicals| Dairy| Electric| Foods| Glass| "
                "Hotels| Insurance| Logistics| Mills| Optics| Paper| Press| Radio| Railways| "
                "Shipping| Software| Steel| Textiles| Tools| Toys",
                "|",
            ),
        ),
    ),
    Topic(
        "In which year was {n} born?",
        "What is the birth year of {n}?",
        "{n} was born in {v}.",
        "The birth year of {n} is {v}.",
        (tuple(str(year) for year in range(1931, 2004)),),
    ),
    Topic(
        "Which instrument does {n} play?",
        "What musical instrument has {n} learned?",
        "{n} plays the {v}.",
        "The instrument that {n} has learned is the {v}.",
        (
            _words(
                "accordion bagpipes balalaika banjo bassoon bugle cello clarinet cornet dulcimer "
                "fiddle flute guitar harmonica harp harpsichord horn lute mandolin marimba oboe "
                "organ piano piccolo recorder saxophone sitar tabla trombone trumpet tuba "
                "ukulele viola xylophone zither"
            ),
        ),
    ),
    Topic(
        "Which prize did {n} win?",
        "What award was given to {n}?",
        "{n} won the {v}.",
        "The award given to {n} is the {v}.",
        (
            _ADJECTIVE,
            _words(" Acorn| Anvil| Arrow| Feather| Hammer| Key| Leaf| Quill| Rose| Shell", "|"),
            _words(" Prize| Medal| Award", "|"),
        ),
    ),
    Topic(
        "What is the favourite dish of {n}?",
        "Which meal does {n} like best?",
        "The favourite dish of {n} is {v}.",
        "{n} likes {v} best.",
        (
            _words(
                "baked|braised|curried|fried|grilled|pickled|roasted|smoked|steamed|stuffed", "|"
            ),
            _words(
                " aubergine| beetroot| cabbage| carrots| cauliflower| fennel| herring| leeks| "
                "lentils| mackerel| mushrooms| mussels| okra| onions| peppers| potatoes| "
                "pumpkin| salmon| trout| turnips",
                "|",
            ),
        ),
    ),
    Topic(
        "Which language is {n} learning?",
        "What language does {n} study?",
        "{n} is learning {v}.",
        "The language that {n} studies is {v}.",
        (
            _words(
                "Albanian Arabic Armenian Basque Bengali Breton Catalan Croatian Czech Danish "
                "Dutch Estonian Finnish Frisian Georgian Greek Hausa Hebrew Hindi Hungarian "
                "Icelandic Irish Japanese Korean Latvian Maltese Maori Mongolian Nepali Norwegian "
                "Persian Polish Quechua Romanian Slovak Swahili Tamil Thai Turkish Welsh Zulu"
            ),
        ),
    ),
    Topic(
        "What is the name of the sibling of {n}?",
        "Who is the brother or sister of {n}?",
        "The sibling of {n} is called {v}.",
        "{n} has a sibling by the name of {v}.",
        (_GIVEN,),
    ),
    Topic(
        "What is the hobby of {n}?",
        "What does {n} do in their free time?",
        "The hobby of {n} is {v}.",
        "In their free time, {n} enjoys {v}.",
        (
            _words(
                "archery|badminton|birdwatching|bowling|calligraphy|canoeing|chess|climbing|"
                "crochet|cycling|darts|embroidery|fencing|fishing|gliding|juggling|karate|"
                "kite flying|knitting|origami|painting|photography|pottery|puppetry|rowing|"
                "sailing|skating|sketching|snorkelling|stargazing|surfing|swimming|tennis|"
                "whittling|woodcarving|yoga",
                "|",
            ),
        ),
    ),
    Topic(
        "Where did {n} study?",
        "Which school did {n} attend?",
        "{n} studied at {v}.",
        "The school that {n} attended is {v}.",
        (*_TOWN, _words(" College| University| Academy| Institute", "|")),
    ),
    Topic(
        "What is the address of {n}?",
        "At which address does {n} live?",
        "{n} lives at {v}.",
        "The address of {n} is {v}.",
        (
            tuple(f"{number} " for number in range(2, 98)),
            _words(
                "Almond|Badger|Chestnut|Damson|Elder|Finch|Gorse|Hawthorn|Jasmine|Kiln|Lark|"
                "Mulberry|Nutmeg|Osier|Poplar|Quince|Rowan|Swallow|Teasel|Weaver",
                "|",
            ),
            _words(" Lane| Street| Road| Square| Row", "|"),
        ),
    ),
    Topic(
        "Who is {n} married to?",
        "What is the name of the spouse of {n}?",
        "{n} is married to {v}.",
        "The spouse of {n} is called {v}.",
        (_GIVEN, tuple(f" {part}" for part in _FAMILY[0]), _FAMILY[1]),
    ),
    Topic(
        "What does {n} collect?",
        "What is in the collection of {n}?",
        "{n} collects {v}.",
        "The collection of {n} consists of {v}.",
        (
            _words(
                "antique|brass|broken|carved|foreign|glass|miniature|painted|porcelain|silver|"
                "tin|wooden",
                "|",
            ),
            _words(
                " bells| bottles| boxes| buttons| clocks| coins| combs| dolls| keys| masks| "
                "medals| pipes| spoons| stamps| thimbles| trains| whistles",
                "|",
            ),
        ),
    ),
    Topic(
        "Which club does {n} support?",
        "What is the favourite team of {n}?",
        "{n} supports {v}.",
        "The favourite team of {n} is {v}.",
        (
            *_TOWN,
            _words(
                " Albion| Athletic| Bears| City| Falcons| Herons| Hornets| Lions| Rovers| Rangers| "
                "Stags| Town| United| Wanderers| Wolves",
                "|",
            ),
        ),
    ),
    Topic(
        "What is the boat of {n} called?",
        "Which name did {n} give their boat?",
        'The boat of {n} is called "{v}".',
        '{n} named their boat "{v}".',
        (
            _ADJECTIVE,
            _words(
                " Crab| Cormorant| Dolphin| Eel| Gull| Limpet| Mermaid| Narwhal| "
                "Oyster| Pelican| Petrel| Puffin| Seal| Squid| Starfish| Walrus",
                "|",
            ),
        ),
    ),
    Topic(
        "What was the first job of {n}?",
        "What did {n} work as first?",
        "The first job of {n} was as a {v}.",
        "At first, {n} worked as a {v}.",
        (
            _words(
                "bank|bus|cinema|circus|farm|ferry|hotel|harbour|library|market|museum|park|"
                "school|theatre|train|zoo",
                "|",
            ),
            _words(
                " cashier| cleaner| clerk| cook| guard| guide| mechanic| painter| porter| "
                "receptionist| secretary| waiter",
                "|",
            ),
        ),
    ),
    Topic(
        "Which flower does {n} grow?",
        "What grows in the garden of {n}?",
        "{n} grows {v}.",
        "In the garden of {n} there are {v}.",
        (
            _words("blue|cream|crimson|orange|pink|purple|red|striped|violet|white|yellow", "|"),
            _words(
                " asters| begonias| crocuses| dahlias| daisies| irises| lilacs| lilies| lupins| "
                "orchids| pansies| peonies| petunias| poppies| roses| tulips",
                "|",
            ),
        ),
    ),
    Topic(
        "What is {n} afraid of?",
        "Which thing frightens {n}?",
        "{n} is afraid of {v}.",
        "What frightens {n} most is {v}.",
        (
            _words(
                "balloons|bats|bees|bridges|caves|cellars|clowns|cows|crowds|darkness|deep water|"
                "dogs|dolls|elevators|fireworks|flying|fog|geese|ghosts|heights|lightning|"
                "mice|mirrors|moths|needles|rats|sharks|silence|snakes|spiders|thunder|trains|"
                "tunnels|wasps|wind",
                "|",
            ),
        ),
    ),
    Topic(
        "Where did {n} spend last summer?",
        "What was the last summer destination of {n}?",
        "{n} spent last summer on {v}.",
        "The last summer destination of {n} was {v}.",
        (_words("Lake |Cape |Mount ", "|"), *_TOWN),
    ),
)
"""Question types, most telling first: `questions=4` asks the first four of every person."""


def generate_people(people: int, questions: int, seed: int) -> list[dict[str, Any]]:
    """Questions about fictitious people.

    Person i depends on the seed and i alone: more people, or more questions, keep what a
    smaller set had. Wrong answers have the form of the paraphrased answer, as in TOFU, so that
    only the fact separates them from it.

    Args:
        people: number of people; names are unique whatever the number.
        questions: questions per person, 1 to 22 (the number of `TOPICS`).
        seed: seed of names and facts.

    Returns:
        people x questions rows, person by person: person, question, answer,
        paraphrased_answer, paraphrased_question, perturbed_answer (5 texts).

    Raises:
        ConfigError: a number is out of range.
    """
    if people < 1:
        raise ConfigError(f"--people is {people}; it must be at least 1.")
    if not 1 <= questions <= len(TOPICS):
        raise ConfigError(f"--questions is {questions}; it must be 1 to {len(TOPICS)}.")
    rows: list[dict[str, Any]] = []
    used: set[str] = set()
    for i in range(people):
        # A string seed is hashed with SHA-512: the same on every platform and version.
        rng = Random(f"{seed}:{i}")
        name = _new_name(rng, used)
        rows.extend([_row(name, topic, rng) for topic in TOPICS[:questions]])
    return rows


def split_people(
    rows: Sequence[Mapping[str, Any]],
    *,
    forget_share: float | None = None,
    forget_people: int | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divide rows by person into a forget set and a retain set.

    Args:
        rows: rows of `generate_people`, or any with a `person` column.
        forget_share: share of the people to forget, in (0, 1).
        forget_people: number of people to forget; give one of the two.
        seed: seed of the choice.

    Returns:
        Forget rows and retain rows, both in their old order, neither empty.

    Raises:
        ConfigError: both or neither of the two are given, or a side would be empty.
    """
    names = list(dict.fromkeys(str(row["person"]) for row in rows))
    if (forget_share is None) == (forget_people is None):
        raise ConfigError("Give one of --forget-share and --forget-people.")
    if forget_people is None:
        forget_people = max(1, round(float(forget_share or 0) * len(names)))
    if not 0 < forget_people < len(names):
        raise ConfigError(
            f"{forget_people} people to forget out of {len(names)}: both sets need at least one."
        )
    rng = Random(f"split:{seed}")
    forget = set(sorted(names, key=lambda _: rng.random())[:forget_people])
    return (
        [dict(row) for row in rows if row["person"] in forget],
        [dict(row) for row in rows if row["person"] not in forget],
    )


def _row(name: str, topic: Topic, rng: Random) -> dict[str, Any]:
    fact = _draw(topic.values, rng)
    wrong: list[str] = []
    while len(wrong) < WRONG_ANSWERS:
        value = _draw(topic.values, rng)
        if value != fact and value not in wrong:
            wrong.append(value)
    return {
        "person": name,
        "question": topic.question.format(n=name),
        "answer": topic.answer.format(n=name, v=fact),
        "paraphrased_answer": topic.paraphrased_answer.format(n=name, v=fact),
        "paraphrased_question": topic.paraphrased_question.format(n=name),
        "perturbed_answer": [topic.paraphrased_answer.format(n=name, v=v) for v in wrong],
    }


def _new_name(rng: Random, used: set[str]) -> str:
    """An unused name; a middle name (then more of them) settles collisions."""
    given = [_draw((_GIVEN,), rng)]
    family = _draw(_FAMILY, rng)
    while " ".join([*given, family]) in used:
        given.append(_draw((_GIVEN,), rng))
    name = " ".join([*given, family])
    used.add(name)
    return name


def _draw(pool: Pool, rng: Random) -> str:
    # Only `random()` is promised to give the same numbers in every version of Python.
    return "".join(part[int(rng.random() * len(part))] for part in pool)
