"""Write the generated tasks of the built-in in-context suite (letters, lists, extraction, some classes).

Deterministic: each task draws from its own `random.Random(name)`, so adding a task changes no other.
`sentiment`, `topic`, `question_or_statement` and `formal_informal` are hand-written JSON and are not made
here; `sentiment_abstract` reads the hand-written sentences of `sentiment.json` and changes only the labels.
The `role` set in a file that exists is kept. With `--check`, write nothing and fail if a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUITE = Path(__file__).resolve().parents[1] / "src/holdfast/measure/suites/incontext"
COUNT = 128  # items a task; divisible by 2 and 4, so two and four labels or positions balance exactly

Item = tuple[str, str]
Builder = Callable[[random.Random], list[Item]]

# Word lists. OBJECTS holds no fruit, animal, plant or colour, so the odd-one-in tasks have one answer.
OBJECTS = """lamp chair table window basket hammer pencil bottle blanket mirror ladder bucket candle carpet
curtain drawer engine envelope fence guitar helmet jacket kettle kitchen lantern letter magnet mattress medal
needle notebook oven paper pillow pocket radio ribbon rope saddle scarf shovel sofa spoon statue suitcase
sweater telephone ticket towel tunnel umbrella vase wagon wallet wheel whistle zipper bridge castle church
cottage desk door garage hotel library mountain museum office palace river roof school station street tower
valley village wall bicycle boat bus camera coin cup drum flag flute glove hat key knife magazine map necklace
newspaper piano picture plate purse ring sandal shelf shirt shoe sock stove tent toothbrush train truck violin
watch yacht compass calendar diary cushion fork jar helicopter island keyboard lock mug napkin ocean quilt
rocket stapler thread uniform vest wardrobe microscope telescope volcano dictionary""".split()
FRUITS = """apple banana pear plum peach grape lemon lime mango melon cherry papaya apricot
pineapple strawberry raspberry blueberry blackberry watermelon grapefruit coconut fig kiwi
cranberry tangerine nectarine pomegranate""".split()
ANIMALS = """dog cat horse cow sheep goat pig lion tiger bear wolf fox rabbit elephant giraffe
zebra monkey camel donkey deer kangaroo koala penguin parrot eagle owl pigeon sparrow chicken
goose shark whale dolphin salmon tuna frog toad lizard crocodile turtle snake spider beetle
butterfly squirrel hedgehog otter badger leopard cheetah panda gorilla hamster raccoon octopus
lobster crab snail ostrich moose walrus peacock buffalo hyena""".split()
PLANTS = """oak pine maple birch willow cedar elm ash poplar spruce rose tulip daisy lily daffodil
sunflower orchid violet carnation poppy lavender dandelion marigold geranium jasmine ivy fern moss
cactus bamboo clover thistle nettle grass wheat barley oats rye corn rice cabbage carrot potato
onion spinach lettuce celery parsley basil mint thyme rosemary sage tomato cucumber pumpkin pepper
radish beetroot turnip broccoli garlic heather holly""".split()
COLOURS = "red blue green yellow purple pink brown black white grey crimson turquoise beige scarlet".split()
VERBS = """sing eat bring forget carry learn write listen speak arrive begin believe borrow choose
collect persuade decide deliver describe destroy discover enjoy explain follow forgive grow hear
imagine invite join know laugh marry obey prepare receive remember repeat send shout sit swim
teach think understand wander weep admit agree allow annoy apologise appear arrange ask avoid
become""".split()
# Nouns that are hardly ever used as verbs, for the odd-one-in task about verbs.
NOUNS = """river kitchen lemon mountain village teacher jacket castle church library museum piano
violin island uncle forest city hotel ocean valley window student camera candle elephant tiger
breakfast morning winter autumn summer evening sofa sweater umbrella wallet cottage palace
geography history music science king queen prince neighbour cousin sister brother farmer lawyer
artist author beach desert planet sky""".split()
ADJECTIVES = """small large old young wooden broken quiet noisy heavy bright dark narrow wide
gentle clever lazy hungry sleepy empty dusty rusty shiny smooth rough soft sharp sweet bitter
ancient modern famous secret lonely cheerful curious brave frozen hidden tiny giant""".split()
VOWEL_WORDS = """actor album alley amber anchor ankle answer apron arrow attic autumn eagle earth
easel echo edge effort elbow elephant emerald engine envelope error evening exit island icon igloo
image index infant insect iron item ivory oak oath object ocean octopus office olive onion opera
orbit orchard order otter oval oven owl oyster ugly ulcer umbrella uncle under update upper urban
urgent usher utter acorn adult airport aunt axle exam event""".split()
SHORT_WORDS = "cup hat key map bus owl fox pen box jar sun egg ant bee car net pin ice leg toe".split()
MEDIUM_WORDS = "lamp door rope boat drum flag ring sock tent wall river chair plate spoon horse tiger".split()
LONG_WORDS = """umbrella elephant mountain suitcase telephone newspaper butterfly crocodile microscope
dictionary helicopter strawberry toothbrush watermelon notebook keyboard necklace telescope magazine
calendar""".split()

# Names and slot fillers for the sentences.
NAMES = """Anna Omar Lucy Peter Maria Daniel Sofia Hassan Emma Lukas Nadia Victor Julia Samuel
Priya Oscar Helen Marcus Leila Simon Clara Diego Ruth Kenji Alice Ahmed Nora Felix Irene Tomas
Grace Adam Elena Hugo Martha Ivan Laura Joseph Fatima Edward Rosa Martin Olga Henry Amina Paul
Susan Andre Mei George Karen Rashid Eva Walter Bella Nicolas Tessa Gavin Linda Yusuf""".split()
SURNAMES = """Baker Lopez Novak Khan Silva Meyer Okafor Tanaka Rossi Larsen Murphy Patel Petrov Schmidt Nguyen
Cohen Walker Dubois Costa Andersen""".split()
CITIES = """Paris London Madrid Rome Berlin Vienna Lisbon Dublin Athens Warsaw Prague Budapest
Oslo Stockholm Helsinki Copenhagen Brussels Amsterdam Zurich Geneva Milan Venice Naples Barcelona
Munich Hamburg Cairo Nairobi Lagos Tunis Istanbul Tehran Baghdad Delhi Mumbai Bangkok Hanoi Manila
Tokyo Osaka Kyoto Seoul Beijing Shanghai Toronto Montreal Vancouver Chicago Boston Seattle Dallas
Houston Denver Miami Lima Bogota Quito Santiago Melbourne Glasgow""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = """teacher baker doctor farmer painter pilot lawyer driver gardener tailor plumber writer nurse sailor
carpenter waiter""".split()
THINGS = "scarf bag car umbrella jacket bicycle vase chair boat lamp hat blanket notebook kettle box door".split()
PLURALS = "books apples tickets chairs letters eggs bottles stamps candles boxes lamps coins plates shirts".split()
SPOTS = "market station library harbour museum school garden bakery office park hotel church".split()

NAME_FORMS = """{name} left the {thing} on the train.
The {job} gave the {thing} to {name}.
Yesterday {name} walked to the {spot} alone.
A letter for {name} arrived this morning.
We met {name} at the {spot}.
The old {thing} belongs to {name}.
{name} is the tallest child in the class.
Nobody told {name} about the party.
After lunch {name} cleaned the {thing}.
The {job} is a good friend of {name}.
My cousin {name} lives near the {spot}.
{name} has worked as a {job} for years.
Did you see {name} at the {spot}?
The prize went to {name} for her short story.
When it rained, {name} ran to the {spot}.
The {thing} was broken, so {name} bought another.
Please tell {name} that dinner is ready.
{name} forgot to lock the {spot}.
The {job} laughed when {name} told the joke.
Every evening {name} plays chess with the {job}.
The dog barked at {name} and the {job}.
According to {name}, the {spot} is closed.
Our neighbour {name} sold us a {thing}.
{name} and the {job} had tea together.
The {job} waited an hour for {name}."""
CITY_FORMS = """{name} moved to {city} last spring.
The train to {city} leaves at noon.
My uncle owns a small shop in {city}.
{city} was covered in snow for a week.
We spent our holiday in {city} with friends.
The {job} was born in {city}.
A new {spot} opened in {city} this month.
{name} flew from {city} in the morning.
The streets of {city} are busy at night.
Have you ever been to {city}?
The {thing} was made in {city}.
In {city}, the {job} found a cheap flat.
She studied music in {city} for two years.
The road between the coast and {city} is closed.
{name} sent me a postcard from {city}.
The largest {spot} in {city} is free to visit.
He drove to {city} to buy a {thing}.
Our team lost the final in {city}.
The mayor of {city} met the {job}.
{city} is famous for its old {spot}.
They missed the last bus to {city}.
The weather in {city} was warm and dry.
Every summer {name} visits {city}.
The {job} wants to leave {city} soon.
A storm hit {city} during the night."""
NUMBER_FORMS = """{name} bought {number} {things} at the market.
There are {number} {things} on the shelf.
{name} is {number} years old.
It took {number} minutes to reach the {spot}.
The {thing} cost {number} dollars.
{number} people waited outside the {spot}.
We counted {number} {things} in the box.
The village is {number} miles from the {spot}.
{name} read {number} pages before lunch.
Only {number} {things} were left.
Bus number {number} stops at the {spot}.
She paid {number} euros for the {thing}.
The {spot} has {number} windows.
The {job} counted {number} {things} last week.
He needs {number} {things} for the party.
The {job} worked for {number} days without rest.
Please bring {number} {things} to the {spot}.
The class has {number} pupils this year.
{name} waited {number} days for an answer.
The tower is {number} metres high.
They planted {number} trees behind the {spot}.
The {thing} weighs {number} pounds.
After {number} hours the {job} went home.
The {job} sold {number} {things} in one morning.
Room {number} is next to the stairs."""
COLOUR_FORMS = """{name} bought a {colour} {thing}.
The {job} painted the {thing} {colour}.
A {colour} {thing} stood near the {spot}.
The walls of the {spot} are {colour}.
{name} always wears {colour} shoes.
My favourite {thing} is {colour}.
The {job} lost a {colour} {thing}.
We followed the {colour} car to the {spot}.
The {thing} looks better in {colour}.
She chose {colour} paint for the kitchen.
Is the {colour} {thing} yours?
The door of the {spot} is {colour} and heavy.
He tied a {colour} ribbon round the {thing}.
They saw a {colour} light above the {spot}.
{name} found a {colour} glove in the street.
The {job} wrote with a {colour} pencil.
Put the keys in the {colour} bag, please.
The team plays in {colour} shirts.
There is a {colour} stain on the {thing}.
The curtains were {colour} and very long.
Their new {thing} is {colour} with a stripe.
{name} gave the {job} a {colour} hat.
A {colour} bird sat on the roof of the {spot}.
The sign at the {spot} has {colour} letters.
The {job} drives a {colour} van."""
DAY_FORMS = """The {spot} is closed on {day}.
{name} will arrive on {day} evening.
On {day} the {job} repaired the {thing}.
We have a meeting next {day}.
The {job} works every {day}.
{day} was the hottest day of the year.
The parcel came last {day}.
{name} lost the {thing} on {day}.
Our lesson is on {day} at nine.
Can you meet me at the {spot} on {day}?
The market opens early each {day}.
They got married on a {day} in June.
By {day} the {thing} must be ready.
The {job} called {name} on {day} morning.
Every {day} she swims before breakfast.
It rained all day on {day}.
The test is on {day}, so {name} is nervous.
He has not eaten since {day}.
Until {day} the {spot} will be empty.
{name} was born on a {day}.
The {job} promised to finish by {day}.
Last {day} we walked to the {spot}.
The new film starts this {day}.
The bins are emptied on {day}.
See you at the {spot} next {day}."""

# Activities as (past, present, future) for a subject in the third person singular.
ACTIVITIES = """baked bread|bakes bread|will bake bread
walked to the station|walks to the station|will walk to the station
painted the fence|paints the fence|will paint the fence
wrote a long letter|writes long letters|will write a long letter
swam across the lake|swims in the lake|will swim across the lake
taught a history class|teaches history|will teach a history class
bought fresh fish|buys fresh fish|will buy fresh fish
sang in the choir|sings in the choir|will sing in the choir
drove to the coast|drives to the coast|will drive to the coast
fed the chickens|feeds the chickens|will feed the chickens
played the violin|plays the violin|will play the violin
went to bed early|goes to bed early|will go to bed early
drank a cup of tea|drinks a cup of tea|will drink a cup of tea
caught the first bus|catches the first bus|will catch the first bus
sold flowers|sells flowers|will sell flowers
washed the windows|washes the windows|will wash the windows
was at the office|is at the office|will be at the office
had a bad cold|has a bad cold|will have a bad cold
climbed the hill|climbs the hill|will climb the hill
told funny stories|tells funny stories|will tell funny stories
repaired old clocks|repairs old clocks|will repair old clocks
flew to Rome|flies to Rome|will fly to Rome
ran in the park|runs in the park|will run in the park
lost the game|loses every game|will lose the game
opened the shop|opens the shop|will open the shop
spoke to the reporters|speaks to the reporters|will speak to the reporters
grew tomatoes|grows tomatoes|will grow tomatoes
visited the museum|visits the museum|will visit the museum
wore a blue coat|wears a blue coat|will wear a blue coat
studied biology|studies biology|will study biology
broke the rules|breaks the rules|will break the rules
carried the boxes upstairs|carries the boxes upstairs|will carry the boxes upstairs
knew the answer|knows the answer|will know the answer
waited for the doctor|waits for the doctor|will wait for the doctor
drew a map of the town|draws maps of the town|will draw a map of the town
built wooden boats|builds wooden boats|will build wooden boats
helped the neighbours|helps the neighbours|will help the neighbours
forgot the keys|forgets the keys|will forget the keys
rode a horse|rides a horse|will ride a horse
stayed at home|stays at home|will stay at home
brought sandwiches|brings sandwiches|will bring sandwiches
cleaned the kitchen|cleans the kitchen|will clean the kitchen
took the dog for a walk|takes the dog for a walk|will take the dog for a walk"""
SUBJECTS = """My sister|The old teacher|Our neighbour|The young pilot|Her uncle|The mayor|
His best friend|The nurse|Grandmother|The man next door|My cousin|The new student|Their daughter|
The captain|Our landlady|The baker"""
TENSES = ("past", "present", "future")

PLACES = """Lake Geneva|the city library|Mount Everest|Brazil|the train station|New Zealand|Tokyo|
the old harbour|Buckingham Palace|the Sahara Desert|Norway|the town hall|a mountain village|Cairo|
the Pacific Ocean|Hyde Park|the corner shop|Barcelona|the public swimming pool|Kenya|
the River Thames|a small island|Oxford Street|Portugal|the football stadium|Hong Kong|
the village church|Lake Baikal|Iceland|the airport|Central Park|Mumbai|the shoe factory|
the Black Forest|Peru|the children's hospital|San Francisco|the bus stop|Stockholm|a quiet beach|
the Rocky Mountains|Thailand|the science museum|Rome|the car park|Trafalgar Square|Poland|
the North Pole|the primary school|Buenos Aires|a busy market|the Grand Canyon|Vietnam|
the hotel lobby|Amsterdam|the Nile Valley|a deep cave|Canada|the post office|the Baltic Sea|
Melbourne|the city zoo|Greece|Heathrow Airport"""
ROLES = """the night nurse|a retired sailor|my grandmother|the school cook|her youngest son|the bus driver
|a famous singer|the tall policeman|our piano teacher|the shop assistant|a lost tourist|his older brother
|the village doctor|a clever student|the football coach|my best friend|the king's daughter|an angry customer
|the new manager|a hungry child"""
TITLES = "Mr Mrs Dr Professor Captain Judge".split()

ATHLETES = """The goalkeeper|Our captain|The young boxer|The tennis champion|A local runner|The home team
|The coach|The swimmer|The cyclist|The rugby captain|The hurdler|The striker|The gymnast|The relay team"""
MATCH_ACTS = """trained hard for the race|waited for the final whistle|won a gold medal|lost the last match
|practised penalty kicks|scored in extra time|left the field with an injury|warmed up before the game
|set a new world record|celebrated in the stadium|prepared for the championship|missed the tournament
|argued about the free kick|finished third in the league"""
COOKS = """The chef|My grandmother|The baker|A hungry guest|The waiter|Our cook|The children|My aunt
|The kitchen helper|The pizza maker|The butcher|The cafe owner|Her father|The school canteen"""
MEAL_ACTS = """made a pot of onion soup|fried two eggs with bacon|served pasta with cheese|baked an apple pie
|peeled the potatoes|added more salt to the stew|cut a slice of chocolate cake|grilled fish with lemon
|ordered rice and beans|stirred the tomato sauce|mixed butter with sugar|tasted the chicken curry
|warmed the bread in the oven|prepared a fruit salad"""
TIMES = "|today|last night|this morning|on Sunday|again|before noon|on Monday evening"  # the first is no time


def _split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("|")]


def _unique(pairs: Iterator[Item], count: int = COUNT) -> list[Item]:
    """Take `count` items with distinct inputs from an endless stream."""
    found: dict[str, str] = {}
    while len(found) < count:
        key, value = next(pairs)
        found.setdefault(key, value)
    return list(found.items())


def _words(rng: random.Random) -> list[str]:
    words = sorted({*OBJECTS, *FRUITS, *ANIMALS, *ADJECTIVES, *PLANTS, *VOWEL_WORDS})
    rng.shuffle(words)
    return words


def _per_word(change: Callable[[str], Item], cap: int = COUNT) -> Builder:
    """One item a word; no output more often than `cap`, so guessing a common letter earns little."""

    def build(rng: random.Random) -> list[Item]:
        seen: Counter[str] = Counter()
        items = []
        for key, value in map(change, _words(rng)):
            seen[value] += 1
            if seen[value] <= cap:
                items.append((key, value))
        return items[:COUNT]

    return build


def _per_list(length: int, answer: Callable[[list[str]], str]) -> Builder:
    """Lists of `length` different words; the output is a function of the list alone."""

    def stream(rng: random.Random) -> Iterator[Item]:
        while True:
            words = rng.sample(OBJECTS, length)
            yield ", ".join(words), answer(words)

    return lambda rng: _unique(stream(rng))


def _odd_one(targets: list[str], others: list[str], length: int = 4) -> Builder:
    """Lists of `length` words, one of them from `targets`; its place goes round, so no place is favoured."""

    def build(rng: random.Random) -> list[Item]:
        pool = _rounds(rng, sorted(set(targets)))
        items = []
        for i in range(COUNT):
            words, target = rng.sample(others, length - 1), next(pool)
            words.insert(i % length, target)
            items.append((", ".join(words), target))
        return items

    return build


def _longest(rng: random.Random) -> list[Item]:
    def stream() -> Iterator[Item]:
        while True:
            words = [rng.choice(SHORT_WORDS), rng.choice(MEDIUM_WORDS), rng.choice(LONG_WORDS)]
            rng.shuffle(words)
            yield ", ".join(words), max(words, key=len)

    return _unique(stream())


def _repeat(rng: random.Random) -> list[Item]:
    def stream() -> Iterator[Item]:
        while True:
            words = [*rng.sample(ADJECTIVES, rng.choice((1, 2))), rng.choice(OBJECTS)]
            yield " ".join(words), " ".join(words)

    return _unique(stream())


def _rounds(rng: random.Random, values: list[str]) -> Iterator[str]:
    """Go through all values in a random order, then again: counts differ by at most one."""
    while True:
        yield from rng.sample(values, len(values))


def _extract(forms: str, slot: str, values: list[str]) -> Builder:
    """Fill the sentence forms; `slot` is the one whose filler is the answer, the others are noise."""

    def stream(rng: random.Random) -> Iterator[Item]:
        form, value = _rounds(rng, forms.splitlines()), _rounds(rng, values)
        noise = {"name": NAMES, "job": JOBS, "thing": THINGS, "things": PLURALS, "spot": SPOTS}
        while True:
            fill = {key: rng.choice(words) for key, words in noise.items()}
            fill[slot] = next(value)
            yield next(form).format(**fill), fill[slot]

    return lambda rng: _unique(stream(rng))


def _labelled(rng: random.Random, groups: dict[str, list[str]], each: int) -> list[Item]:
    """`each` inputs a label, drawn without repeats, in a random order."""
    items = [(text, label) for label, texts in groups.items() for text in rng.sample(texts, each)]
    rng.shuffle(items)
    return items


def _tense(rng: random.Random) -> list[Item]:
    subjects = _rounds(rng, _split(SUBJECTS))
    rows = [line.split("|") for line in ACTIVITIES.splitlines()]
    items = [(f"{next(subjects)} {row[k]}.", TENSES[k]) for row in rows for k in range(3)]
    rng.shuffle(items)
    return items


def _person_or_place(rng: random.Random) -> list[Item]:
    first, last, title = _rounds(rng, NAMES), _rounds(rng, SURNAMES), _rounds(rng, TITLES)
    full = [f"{next(first)} {next(last)}" for _ in range(32)]
    titled = [f"{next(title)} {next(last)}" for _ in range(12)]
    people = [*full, *titled, *_split(ROLES)]
    return _labelled(rng, {"person": people, "place": _split(PLACES)}, COUNT // 2)


def _animal_plant(rng: random.Random) -> list[Item]:
    return _labelled(rng, {"X": ANIMALS, "Y": PLANTS}, 60)


def _vowel_start(rng: random.Random) -> list[Item]:
    consonant = [word for word in _words(rng) if word[0] not in "aeiou"]
    return _labelled(rng, {"A": sorted(set(VOWEL_WORDS)), "B": consonant}, COUNT // 2)


def _topic_abstract(rng: random.Random) -> list[Item]:
    def sentences(who: str, acts: str) -> list[str]:
        people, doing = _rounds(rng, _split(who)), _rounds(rng, _split(acts))
        times = _rounds(rng, _split(TIMES))
        made = ((f"{next(people)} {next(doing)} {next(times)}".strip() + ".", "") for _ in iter(int, 1))
        return [text for text, _ in _unique(made, COUNT // 2)]

    groups = {"dax": sentences(ATHLETES, MATCH_ACTS), "wug": sentences(COOKS, MEAL_ACTS)}
    return _labelled(rng, groups, COUNT // 2)


def _sentiment_abstract(rng: random.Random) -> list[Item]:
    task = json.loads((SUITE / "sentiment.json").read_text(encoding="utf-8"))
    symbol = {"positive": "foo", "negative": "bar"}
    items = [(item["input"], symbol[item["output"]]) for item in task["items"]]
    rng.shuffle(items)
    return items


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one task says and how its items are built; `name` is the seed of its draws."""

    name: str
    category: str
    instruction: str
    input_name: str
    output_name: str
    build: Builder
    labels: list[str] | None = None


def _spec(name: str, category: str, instruction: str, names: str, build: Builder, labels: str = "") -> Spec:
    input_name, output_name = names.split("/")
    return Spec(
        name=name,
        category=category,
        instruction=instruction,
        input_name=input_name,
        output_name=output_name,
        build=build,
        labels=labels.split() or None,
    )


NUMBERS = [str(n) for n in range(3, 99)]
# The letter cap keeps the commonest answer under one item in ten.
SPECS = [
    _spec("first_letter", "letters", "Give the first letter of the word.", "Word/Letter",
          _per_word(lambda w: (w, w[0]), cap=9)),
    _spec("last_letter", "letters", "Give the last letter of the word.", "Word/Letter",
          _per_word(lambda w: (w, w[-1]), cap=12)),
    _spec("capitalize", "letters", "Write the word with a capital first letter.", "Word/Capitalized",
          _per_word(lambda w: (w, w.capitalize()))),
    _spec("uppercase", "letters", "Write the word in capital letters.", "Word/Upper case",
          _per_word(lambda w: (w, w.upper()))),
    _spec("lowercase", "letters", "Write the word in small letters.", "Word/Lower case",
          _per_word(lambda w: (w.upper(), w))),
    _spec("first_of_three", "lists", "Give the first word of the list.", "List/First",
          _per_list(3, lambda ws: ws[0])),
    _spec("last_of_three", "lists", "Give the last word of the list.", "List/Last",
          _per_list(3, lambda ws: ws[2])),
    _spec("middle_of_three", "lists", "Give the middle word of the list.", "List/Middle",
          _per_list(3, lambda ws: ws[1])),
    _spec("second_of_four", "lists", "Give the second word of the list.", "List/Second",
          _per_list(4, lambda ws: ws[1])),
    _spec("remove_first", "lists", "Leave out the first word and give the rest of the list.", "List/Rest",
          _per_list(3, lambda ws: ", ".join(ws[1:]))),
    _spec("repeat", "lists", "Repeat the phrase.", "Phrase/Repeat", _repeat),
    _spec("longest_word", "lists", "Give the longest word of the list.", "List/Longest", _longest),
    _spec("fruit_among_objects", "lists", "Give the word that is a fruit.", "List/Fruit",
          _odd_one(FRUITS, OBJECTS)),
    _spec("animal_among_objects", "lists", "Give the word that is an animal.", "List/Animal",
          _odd_one(ANIMALS, OBJECTS)),
    _spec("colour_among_words", "lists", "Give the word that is a colour.", "List/Colour",
          _odd_one(COLOURS, OBJECTS)),
    _spec("verb_among_nouns", "lists", "Give the word that is a verb.", "List/Verb", _odd_one(VERBS, NOUNS)),
    _spec("extract_name", "extraction", "Give the name of the person in the sentence.", "Sentence/Name",
          _extract(NAME_FORMS, "name", NAMES)),
    _spec("extract_city", "extraction", "Give the city in the sentence.", "Sentence/City",
          _extract(CITY_FORMS, "city", CITIES)),
    _spec("extract_number", "extraction", "Give the number in the sentence.", "Sentence/Number",
          _extract(NUMBER_FORMS, "number", NUMBERS)),
    _spec("extract_colour", "extraction", "Give the colour in the sentence.", "Sentence/Colour",
          _extract(COLOUR_FORMS, "colour", COLOURS)),
    _spec("extract_day", "extraction", "Give the day of the week in the sentence.", "Sentence/Day",
          _extract(DAY_FORMS, "day", DAYS), " ".join(DAYS)),
    _spec("tense", "classification", "Say whether the sentence is about the past, the present or the future.",
          "Sentence/Tense", _tense, " ".join(TENSES)),
    _spec("person_or_place", "classification", "Say whether the phrase names a person or a place.",
          "Phrase/Kind", _person_or_place, "person place"),
    _spec("sentiment_abstract", "abstract", "Give the label of the sentence.", "Sentence/Label",
          _sentiment_abstract, "foo bar"),
    _spec("topic_abstract", "abstract", "Give the label of the sentence.", "Sentence/Label",
          _topic_abstract, "dax wug"),
    _spec("animal_plant_abstract", "abstract", "Give the label of the word.", "Word/Label",
          _animal_plant, "X Y"),
    _spec("vowel_start_abstract", "abstract", "Give the label of the word.", "Word/Label",
          _vowel_start, "A B"),
]  # fmt: skip


def _role(path: Path) -> str:
    """The role is chosen by measurement, not by this script, so a set one survives."""
    return json.loads(path.read_text(encoding="utf-8"))["role"] if path.exists() else ""


def render(spec: Spec, role: str = "") -> str:
    """The JSON text of one task; the same on every machine."""
    items = [{"input": key, "output": value} for key, value in spec.build(random.Random(spec.name))]
    task = {
        "name": spec.name,
        "version": 1,
        "role": role,
        "category": spec.category,
        "instruction": spec.instruction,
        "input_name": spec.input_name,
        "output_name": spec.output_name,
        "labels": spec.labels,
        "items": items,
    }
    return json.dumps(task, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the tasks, or with `--check` return 1 and name the files that differ."""
    parser = argparse.ArgumentParser(description="Write the generated in-context tasks.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    check = parser.parse_args(argv).check
    stale = []
    for spec in SPECS:
        path = SUITE / f"{spec.name}.json"
        text = render(spec, _role(path))
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python tools/make_incontext.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
