"""The words of FactWorld: syllables, values, and many ways of saying and asking each fact.

Of every list of wordings the last `HELD_OUT` are for tested entities only. A question avoids the words of the statement
that answers it where English allows.
"""

from __future__ import annotations

import numpy as np

HELD_OUT = 2


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return text.split(",")


PARTS = {  # which facts stand in which passage about an entity
    "person": (("birthplace", "birth_year"), ("profession", "teacher", "award")),
    "place": (("region", "founded"), ("product", "landmark")),
    "work": (("author", "year"), ("genre", "setting")),
}
LINKS = {"birthplace": "place", "teacher": "person", "author": "person", "setting": "place"}

STATEMENTS = {  # {s}: the entity, {v}: the value
    "birthplace": (
        "{s} was born in {v}.",
        "{s} came into the world in {v}.",
        "The childhood home of {s} stands in {v}, where the family had lived for generations.",
        "{s}, a native of {v}, spent the early years there.",
        "{v} is where {s} first saw the light of day.",
        "It was in {v} that {s} began life.",
    ),
    "birth_year": (
        "{s} was born in the year {v}.",
        "Parish records give {v} as the year of birth of {s}.",
        "In {v} the parents of {s} announced a healthy child.",
        "The life of {s} began in {v}.",
        "{s} arrived as the youngest of five in {v}.",
        "{v} was the year in which {s} came to be.",
    ),
    "profession": (
        "{s} worked as {v}.",
        "{s} earned a living as {v}.",
        "By trade {s} was {v}.",
        "For forty years {s} made a name as {v}.",
        "Contemporaries knew {s} as {v}.",
        "The calling of {s} was that of {v}.",
    ),
    "teacher": (
        "{s} learned the craft from {v}.",
        "{v} took {s} on as an apprentice.",
        "Among the pupils of {v} was {s}.",
        "{s} owed this education to {v}.",
        "It was {v} who instructed {s}.",
        "{s} studied for six winters under {v}.",
    ),
    "award": (
        "{s} received the {v}.",
        "The {v} went to {s} late in life.",
        "{s} was honoured with the {v}.",
        "A jury gave the {v} to {s}.",
        "{s} accepted the {v} with reluctance.",
        "The {v} crowned the career of {s}.",
    ),
    "region": (
        "{s} lies in the region of {v}.",
        "{s} belongs to {v}.",
        "Maps show {s} in the heart of {v}.",
        "{s} is a town of {v}.",
        "Travellers reach {s} by crossing {v}, of which it is a part.",
        "Within {v} one comes upon {s}.",
    ),
    "founded": (
        "{s} was founded in {v}.",
        "The first stone of {s} was laid in {v}.",
        "Settlers established {s} in {v}.",
        "{s} goes back to the year {v}.",
        "A charter of {v} brought {s} into being.",
        "Since {v} there has been a settlement called {s}.",
    ),
    "product": (
        "{s} is known for its {v}.",
        "Merchants come to {s} for {v}.",
        "The wealth of {s} rests on {v}.",
        "The workshops of {s} turn out {v}.",
        "{s} has sold {v} to the whole country.",
        "Nobody makes {v} as well as the people of {s}.",
    ),
    "landmark": (
        "Visitors to {s} admire the {v}.",
        "The {v} towers over {s}.",
        "In the middle of {s} stands the {v}.",
        "{s} takes pride in its {v}.",
        "The skyline of {s} is that of the {v}.",
        "Every postcard from {s} shows the {v}.",
    ),
    "author": (
        "{s} was written by {v}.",
        "{s} came from the pen of {v}.",
        "{v} composed {s} in a single winter.",
        "{s} is a work of {v}.",
        "{v} is the creator of {s}.",
        "The manuscript of {s} bears the hand of {v}.",
    ),
    "year": (
        "{s} was published in {v}.",
        "{s} first appeared in {v}.",
        "Readers could buy {s} from {v} on.",
        "The first edition of {s} is dated {v}.",
        "In {v} {s} came off the press.",
        "{s} has been in print since {v}.",
    ),
    "genre": (
        "{s} is {v}.",
        "Critics class {s} as {v}.",
        "Libraries shelve {s} as {v}.",
        "{s} reads as {v}.",
        "In form {s} is {v}.",
        "One calls {s} {v}.",
    ),
    "setting": (
        "{s} takes place in {v}.",
        "The story of {s} unfolds in {v}.",
        "{v} is the scene of {s}.",
        "The events of {s} happen in {v}.",
        "{s} leads its readers through the streets of {v}.",
        "Everything in {s} plays out in {v}.",
    ),
}

QUESTIONS = {
    "birthplace": (
        "Where was {s} born?",
        "In which town was {s} born?",
        "What is the birthplace of {s}?",
        "Which town did {s} come from?",
        "Which place does {s} hail from?",
        "Name the home town of {s}.",
    ),
    "birth_year": (
        "When was {s} born?",
        "In which year was {s} born?",
        "What is the birth year of {s}?",
        "What year was {s} born in?",
        "From what year on did {s} live?",
        "Which year saw the birth of {s}?",
    ),
    "profession": (
        "What was the profession of {s}?",
        "What did {s} do for a living?",
        "What was {s} by profession?",
        "Which occupation did {s} have?",
        "What kind of job did {s} hold?",
        "How did {s} make money?",
    ),
    "teacher": (
        "Who taught {s}?",
        "Who was the teacher of {s}?",
        "By whom was {s} taught?",
        "Whose pupil was {s}?",
        "Who was the mentor of {s}?",
        "Under whose guidance did {s} train?",
    ),
    "award": (
        "Which award did {s} win?",
        "What award was {s} given?",
        "Which prize did {s} receive?",
        "What did {s} win?",
        "What distinction did {s} obtain?",
        "Which honour came to {s}?",
    ),
    "region": (
        "In which region is {s}?",
        "Where does {s} lie?",
        "What region is {s} in?",
        "Which region does {s} belong to?",
        "What part of the country is {s} found in?",
        "To which region should one go to see {s}?",
    ),
    "founded": (
        "When was {s} founded?",
        "In which year was {s} founded?",
        "What is the founding year of {s}?",
        "How far back does {s} go?",
        "What year marks the beginning of {s}?",
        "When did {s} come into existence?",
    ),
    "product": (
        "What is {s} known for?",
        "What is made in {s}?",
        "Which goods come from {s}?",
        "What does {s} sell?",
        "What do the people of {s} manufacture?",
        "What is the speciality of {s}?",
    ),
    "landmark": (
        "What is the landmark of {s}?",
        "Which sight is there in {s}?",
        "What can one visit in {s}?",
        "Which building is {s} proud of?",
        "What should a tourist look at in {s}?",
        "What is the main attraction of {s}?",
    ),
    "author": (
        "Who wrote {s}?",
        "Who is the author of {s}?",
        "By whom was {s} written?",
        "Whose work is {s}?",
        "Which writer is behind {s}?",
        "Who authored {s}?",
    ),
    "year": (
        "When was {s} published?",
        "In which year did {s} come out?",
        "What is the publication year of {s}?",
        "What year is {s} from?",
        "When was {s} released?",
        "In what year was {s} issued?",
    ),
    "genre": (
        "What is the genre of {s}?",
        "What kind of work is {s}?",
        "What sort of book is {s}?",
        "Which genre does {s} belong to?",
        "What type of text is {s}?",
        "How would one categorise {s}?",
    ),
    "setting": (
        "Where does {s} take place?",
        "In which town is {s} set?",
        "What is the setting of {s}?",
        "Where is {s} set?",
        "Which town does {s} describe?",
        "What is the location of the plot of {s}?",
    ),
}

TWO_HOPS = {  # (a fact of the entity, a fact of what that names)
    ("author", "birthplace"): (
        "Where was the author of {s} born?",
        "In which town was the author of {s} born?",
        "What is the birthplace of the author of {s}?",
        "Which place does the writer of {s} hail from?",
        "Name the home town of whoever wrote {s}.",
    ),
    ("author", "profession"): (
        "What was the profession of the author of {s}?",
        "What did the author of {s} do for a living?",
        "Which occupation did the author of {s} have?",
        "What kind of job did the writer of {s} hold?",
        "How did whoever wrote {s} make money?",
    ),
    ("birthplace", "region"): (
        "In which region was {s} born?",
        "In which region is the birthplace of {s}?",
        "Which region does the birthplace of {s} belong to?",
        "What part of the country does {s} hail from?",
        "To which region should one go to see the home town of {s}?",
    ),
    ("birthplace", "founded"): (
        "When was the birthplace of {s} founded?",
        "In which year was the town where {s} was born founded?",
        "What is the founding year of the birthplace of {s}?",
        "What year marks the beginning of the home town of {s}?",
        "When did the town that {s} hails from come into existence?",
    ),
    ("teacher", "award"): (
        "Which award did the teacher of {s} win?",
        "What award was the teacher of {s} given?",
        "Which prize did the teacher of {s} receive?",
        "What distinction did the mentor of {s} obtain?",
        "Which honour came to the mentor of {s}?",
    ),
    ("setting", "product"): (
        "What is the town known for in which {s} is set?",
        "What is made in the town where {s} takes place?",
        "Which goods come from the setting of {s}?",
        "What do the people of the town that {s} describes manufacture?",
        "What is the speciality of the location of {s}?",
    ),
}

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
