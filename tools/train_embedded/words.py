"""Word lists by hand: seeds for the teacher's stories, and common nouns for substitution and evaluation."""

from __future__ import annotations

ANIMALS = """
dog cat bird rabbit bear mouse fox duck frog fish horse cow pig sheep goat lion tiger elephant
monkey giraffe zebra owl turtle snail squirrel hedgehog deer wolf bee ant butterfly spider worm
ladybug penguin seal whale dolphin shark crab octopus parrot crow eagle swan goose chicken rooster
hen lamb puppy kitten pony donkey camel kangaroo koala panda hippo rhino crocodile snake lizard
dragon dinosaur unicorn bat raccoon beaver otter mole caterpillar cricket firefly robin sparrow
peacock flamingo hamster bunny llama moose walrus lobster
""".split()

PEOPLE = """
boy girl king queen prince princess farmer baker doctor teacher pirate knight wizard witch fairy
giant sailor soldier policeman fireman nurse painter singer dancer clown robot ghost monster mermaid
grandmother grandfather mother father baby brother sister uncle aunt neighbor friend captain chef
driver hunter gardener pilot astronaut cowboy magician thief twin child lady man woman shopkeeper
mailman builder fisherman
""".split()

THINGS = """
ball doll kite balloon box book hat coat shoe boot sock scarf glove dress ring crown necklace button
ribbon blanket pillow bed chair table lamp candle clock mirror key lock door window cup plate spoon
fork bowl pot pan bottle jar basket bag backpack bucket rope net ladder hammer nail saw shovel broom
brush comb soap towel toy truck car bus train boat ship plane bike wagon sled wheel drum bell
whistle piano guitar violin trumpet pen pencil crayon paper letter card map flag coin gift present
umbrella tent flashlight camera phone radio television computer rocket puzzle block robot puppet
mask sword shield wand treasure chest feather shell stone rock stick leaf flower seed tree log
branch cake cookie pie bread apple banana orange pear lemon cherry grape strawberry blueberry peach
plum melon watermelon carrot potato tomato onion corn pumpkin mushroom egg cheese sandwich soup
pizza pancake candy chocolate honey jam milk juice tea ice-cream lollipop popcorn nut needle thread
magnet telescope compass lantern vase statue picture painting fan oven fridge statue bench swing
slide seesaw helmet jacket sweater mitten slipper purse wallet ticket ladle kettle teapot snowman
sandcastle skateboard scooter tractor helicopter submarine anchor paddle oar crystal diamond pearl
gem medal trophy battery lightbulb hose sponge mop pebble acorn cactus rose daisy tulip sunflower
marble dice domino yo-yo bubble
""".split()

PLACES = """
park forest garden house castle beach school farm zoo village town city river lake pond sea ocean
mountain hill cave field meadow jungle desert island bridge road street store shop market library
museum hospital kitchen bedroom bathroom attic basement barn cottage tower tunnel valley swamp yard
playground bakery harbor train-station airport theater circus
""".split()

NATURE = """
rain snow wind storm cloud sun moon star rainbow fire ice shadow sand mud wave water light dream
song dance game race party picnic secret wish magic adventure idea noise smell nest egg hole puddle
trap surprise birthday holiday morning night winter summer spring
""".split()

ADJECTIVES = """
red blue green yellow purple pink orange black white brown golden silver big small tiny huge long
short tall round shiny old new soft hard warm cold hot wet dry clean dirty loud quiet fast slow
heavy light happy sad angry scared brave kind clever silly funny lazy hungry sleepy lonely curious
gentle grumpy polite proud shy strong weak pretty ugly beautiful magic special strange sweet sour
sticky fluffy furry smooth rough sharp broken lost hidden colorful bright dark wooden plastic
""".split()

NAMES = """
Lily Tom Ben Mia Sue Tim Max Anna Sam Sara Jack Lucy Leo Emma Jane Bob Amy Kim Bella Daisy Billy
Jill Molly Nina Fred Rose Finn Zoe Ella Oscar Ruby Henry Polly Peter Spot Buddy Whiskers Mittens Rex
""".split()


def concrete_nouns() -> list[str]:
    """All hand-listed nouns without hyphens, each once, in a fixed order."""
    words = ANIMALS + PEOPLE + THINGS + PLACES + NATURE
    return [word for word in dict.fromkeys(words) if "-" not in word]


def with_article(phrase: str) -> str:
    """``dog`` -> ``a dog``, ``old owl`` -> ``an old owl``."""
    article = (
        "an" if phrase[:1].lower() in "aeio" or phrase.startswith(("ugly", "umbrella", "uncle")) else "a"
    )
    return f"{article} {phrase}"
