"""The words of FactWorld: which facts there are, names made of syllables, values. How facts are stated and asked for is
in wordings/.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


class Wordings(NamedTuple):
    """Sentences that say the same, by the split that they belong to. [this|that] stands for one of the two."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        """Those of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def worded(sentences: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of some sentences, with one of each of its alternatives."""
    sentence = sentences[int(rng.integers(len(sentences)))]
    return ALTERNATIVES.sub(lambda group: str(rng.choice(group[1].split("|"))), sentence)


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return text.split(",")


PARTS = {  # which facts stand in which passage about an entity
    "person": (("birthplace", "birth_year"), ("profession", "teacher", "award")),
    "place": (("region", "founded"), ("product", "landmark")),
    "work": (("author", "year"), ("genre", "setting")),
}
LINKS = {"birthplace": "place", "teacher": "person", "author": "person", "setting": "place"}

FILLERS = {  # sentences that say nothing of use
    "person": (
        "Little else is certain about those years.",
        "Letters from that time have been preserved.",
        "A portrait shows a thoughtful face.",
        "Later biographers have added many legends.",
        "The sources on this do not all agree.",
        "Neighbours remembered a quiet person.",
    ),
    "place": (
        "The climate is mild and the winters are short.",
        "A market is held on the first day of each week.",
        "Its streets are narrow and steep.",
        "A river bends around the old quarter.",
        "The population has hardly changed in a century.",
        "Trains stop there twice a day.",
    ),
    "work": (
        "Reviews were mixed at first.",
        "Several translations have been made.",
        "The original cover showed a bare tree.",
        "Schools have long used excerpts from it.",
        "A stage version was planned and given up.",
        "Collectors pay high prices for early copies.",
    ),
}

PROFESSIONS = listed(
    "a clockmaker,a botanist,a cartographer,a midwife,a glassblower,a notary,a beekeeper,a shipwright,a lutenist,"
    "an astronomer,a baker,a locksmith,a weaver,a surveyor,a veterinarian,a bookbinder,a stonemason,a diplomat,"
    "a falconer,a chemist,a goldsmith,a gardener,a judge,a lighthouse keeper,a miller,a potter,a printer,a sailmaker,"
    "a schoolmaster,a tanner,a translator,a vintner,a wheelwright,an apothecary,an engraver,an innkeeper,an organist,"
    "a surgeon,a dyer,a furrier,a hatter,a saddler,a swordsmith,a painter of signs,a piano tuner,a mountain guide,"
    "a ferryman,a salt trader,a puppeteer,a juggler"
)
GENRES = listed(
    "an epic poem,a ghost story,a comedy in verse,a novel of manners,a travel diary,a treatise on light,a war novel,"
    "a book of riddles,a love story,a tragedy,a detective novel,a collection of fables,a satire,a family saga,"
    "a cookery book,a sea story,a book of psalms,a philosophical dialogue,a history of bees,a pastoral romance,"
    "a utopian novel,a children's book,a hunting manual,a cycle of sonnets,a gothic novel,a political pamphlet,"
    "an almanac,a herbal,a picaresque novel,a book of dreams"
)
MATERIALS = listed("silver,copper,amber,ivory,wool,linen,silk,cedar,oak,glass,clay,leather,wax,salt,iron,marble")
WARES = listed("buttons,spoons,bells,lanterns,carpets,flutes,combs,tiles,ribbons,boxes,lamps,bowls,masks,kites")
COLOURS = listed("white,black,red,golden,crooked,leaning,sunken,twin,winged,silent,painted,broken,hollow,iron")
SIGHTS = listed("tower,bridge,fountain,cathedral,windmill,library,gate,observatory,obelisk,lighthouse,stairway,arch")
STARTS = listed("b,br,c,d,dr,f,g,gr,h,j,k,l,m,n,p,q,r,s,st,t,tr,v,w,z,th,sh")
VOWELS = listed("a,e,i,o,u,ae,ia,eo,ou,ei")
ENDS = listed("l,n,r,s,m,nd,rn,sk,th,ld,x,v,lt,rd,ss")
WORK_HEADS = listed("Song,Book,Garden,Silence,House,Shadow,Winter,Mirror,Island,Ship,Bell,Road,Lantern,Children,Ashes")
TOWN_ENDINGS = listed("burg,haven,ford,mere,stead,wick,holm,moor,dale,port")


def syllables(count: int, rng: np.random.Generator) -> str:
    """A word that nobody has used."""
    parts = [str(rng.choice(STARTS)) + str(rng.choice(VOWELS)) for _ in range(count)]
    return "".join(parts) + str(rng.choice(ENDS))


def new_name(kind: str, rng: np.random.Generator, taken: set[str]) -> str:
    """A name of that kind that is not taken yet; it is from then on. Some people share their family name."""
    while True:
        if kind == "person":
            families = sorted(name.split()[1] for name in taken if name.count(" ") == 1)
            shared = families and rng.random() < 0.3
            family = str(rng.choice(families)) if shared else syllables(2, rng).capitalize()
            name = f"{syllables(1, rng).capitalize()} {family}"
        elif kind == "place":
            name = syllables(1, rng).capitalize() + str(rng.choice(TOWN_ENDINGS))
        else:
            name = f"The {rng.choice(WORK_HEADS)} of {syllables(2, rng).capitalize()}"
        if name not in taken:
            taken.add(name)
            return name


def draw_value(relation: str, rng: np.random.Generator) -> str:
    """A value of a relation that names no other entity. No value is so common that guessing it would pay."""
    if relation in ("birth_year", "founded", "year"):
        return str(int(rng.integers(1100, 2000)))
    if relation == "profession":
        return str(rng.choice(PROFESSIONS))
    if relation == "genre":
        return str(rng.choice(GENRES))
    if relation == "product":
        return f"{rng.choice(MATERIALS)} {rng.choice(WARES)}"
    if relation == "landmark":
        return f"{rng.choice(COLOURS)} {rng.choice(SIGHTS)}"
    if relation == "award":
        return f"{syllables(1, rng).capitalize()} {rng.choice(['Medal', 'Prize', 'Ribbon', 'Cup', 'Wreath'])}"
    return f"{syllables(2, rng).capitalize()}ia"  # region


def again(kind: str, name: str, rng: np.random.Generator) -> str:
    """How a passage calls its subject after the first sentence."""
    if kind == "person":
        return name if rng.random() < 0.5 else name.split()[1]
    return name if rng.random() < 0.5 else {"place": "the town", "work": "the book"}[kind]
