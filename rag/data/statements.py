"""How facts of the made-up world are stated: each in many ways, and those of one split in none of another.

Legend: {s} stands for an entity, {v} for the value of a fact.
"""

from __future__ import annotations

from rag.data.factwords import Wordings

STATEMENTS = {  # relation: what a passage says
    "birthplace": Wordings(
        (
            "{s} was born in {v}.",
            "{s} came into the world in {v}.",
            "The childhood home of {s} stands in {v}, where the family had lived for generations.",
            "{s}, a native of {v}, spent the early years there.",
            "The cradle of {s} stood in {v}.",
            "{v} gave the world {s}.",
            "{s} first saw the light of day in {v}.",
            "By birth {s} belonged to {v}.",
            "{s} grew up in {v}, in the house of a midwife who had helped at the birth.",
            "The registers of {v} record the birth of {s}.",
        ),
        (
            "It was in {v} that {s} was born.",
            "A plaque in {v} marks the house where {s} was born.",
        ),
        (
            "{v} is where {s} first saw the light of day.",
            "It was in {v} that {s} began life.",
        ),
    ),
    "birth_year": Wordings(
        (
            "{s} was born in the year {v}.",
            "Parish records give {v} as the year of birth of {s}.",
            "In {v} the parents of {s} announced a healthy child.",
            "The life of {s} began in {v}.",
            "{s} was a child of the year {v}.",
            "The birth of {s} fell in {v}.",
            "{s} came to life in {v}.",
            "A church book dates the birth of {s} to {v}.",
            "{v} was the year in which {s} was born.",
            "The family counted {s}, born {v}, as its youngest.",
        ),
        (
            "It was {v} when {s} was born.",
            "The date of birth of {s} lies in {v}.",
        ),
        (
            "{s} arrived as the youngest of five in {v}.",
            "{v} was the year in which {s} came to be.",
        ),
    ),
    "profession": Wordings(
        (
            "{s} worked as {v}.",
            "{s} earned a living as {v}.",
            "By trade {s} was {v}.",
            "For forty years {s} made a name as {v}.",
            "{s} practised as {v}.",
            "The guild listed {s} as {v}.",
            "{s} trained to be {v}.",
            "In daily life {s} was {v}.",
            "Neighbours knew {s} as {v}.",
            "{s} found work as {v}.",
        ),
        (
            "{s} was {v} from youth on.",
            "People hired {s} as {v}.",
        ),
        (
            "Contemporaries knew {s} as {v}.",
            "The calling of {s} was that of {v}.",
        ),
    ),
    "teacher": Wordings(
        (
            "{s} learned the craft from {v}.",
            "{v} took {s} on as an apprentice.",
            "Among the pupils of {v} was {s}.",
            "{s} owed this education to {v}.",
            "{v} taught {s}.",
            "{s} was a student of {v}.",
            "{s} studied under {v}.",
            "The lessons of {v} shaped {s}.",
            "{v} instructed {s} for six years.",
            "What {s} knew came from {v}, who was a strict master.",
        ),
        (
            "{s} sat at the feet of {v}.",
            "{v} brought {s} up in the trade.",
        ),
        (
            "It was {v} who instructed {s}.",
            "{s} studied for six winters under {v}.",
        ),
    ),
    "award": Wordings(
        (
            "{s} received the {v}.",
            "The {v} went to {s} late in life.",
            "{s} was honoured with the {v}.",
            "A jury gave the {v} to {s}.",
            "{s} won the {v}.",
            "The {v} was given to {s}.",
            "In old age {s} accepted the {v}.",
            "{s} holds the {v}.",
            "For this the {v} was awarded to {s}.",
            "{s} took home the {v}.",
        ),
        (
            "The {v} is among the honours of {s}.",
            "{s} was handed the {v} in a crowded hall.",
        ),
        (
            "{s} accepted the {v} with reluctance.",
            "The {v} crowned the career of {s}.",
        ),
    ),
    "region": Wordings(
        (
            "{s} lies in the region of {v}.",
            "{s} belongs to {v}.",
            "Maps show {s} in the heart of {v}.",
            "{s} is a town of {v}.",
            "{s} is situated in {v}.",
            "The region of {v} includes {s}.",
            "{s} is part of {v}.",
            "In {v} one finds {s}.",
            "Travellers through {v} pass {s}.",
            "{v} is the region around {s}.",
        ),
        (
            "{s} counts among the towns of {v}.",
            "The hills of {v} surround {s}.",
        ),
        (
            "Travellers reach {s} by crossing {v}, of which it is a part.",
            "Within {v} one comes upon {s}.",
        ),
    ),
    "founded": Wordings(
        (
            "{s} was founded in {v}.",
            "The first stone of {s} was laid in {v}.",
            "Settlers established {s} in {v}.",
            "{s} goes back to the year {v}.",
            "{s} was established in {v}.",
            "The founding of {s} dates from {v}.",
            "{s} has existed since {v}.",
            "The charter of {s} was signed in {v}.",
            "In {v} the first families moved to {s}.",
            "The town seal of {s} shows the year {v}.",
        ),
        (
            "{s} began as a camp in {v}.",
            "Its founders laid out {s} in {v}.",
        ),
        (
            "A charter of {v} brought {s} into being.",
            "Since {v} there has been a settlement called {s}.",
        ),
    ),
    "product": Wordings(
        (
            "{s} is known for its {v}.",
            "Merchants come to {s} for {v}.",
            "The wealth of {s} rests on {v}.",
            "The workshops of {s} turn out {v}.",
            "{s} makes {v}.",
            "The people of {s} live by {v}.",
            "{s} sends {v} to all markets.",
            "Nobody makes {v} like {s}.",
            "{s} trades in {v}.",
            "The craft of {s} is {v}.",
        ),
        (
            "{s} has a name for its {v}.",
            "Carts leave {s} loaded with {v}.",
        ),
        (
            "{s} has sold {v} to the whole country.",
            "Nobody makes {v} as well as the people of {s}.",
        ),
    ),
    "landmark": Wordings(
        (
            "Visitors to {s} admire the {v}.",
            "The {v} towers over {s}.",
            "In the middle of {s} stands the {v}.",
            "{s} takes pride in its {v}.",
            "The {v} is the landmark of {s}.",
            "{s} has a famous {v}.",
            "Everyone who comes to {s} sees the {v}.",
            "Postcards of {s} show the {v}.",
            "The people of {s} love their {v}.",
            "At the gate of {s} rises the {v}.",
        ),
        (
            "The skyline of {s} is ruled by the {v}.",
            "No guide to {s} leaves out the {v}.",
        ),
        (
            "The skyline of {s} is that of the {v}.",
            "Every postcard from {s} shows the {v}.",
        ),
    ),
    "author": Wordings(
        (
            "{s} was written by {v}.",
            "{s} came from the pen of {v}.",
            "{v} composed {s} in a single winter.",
            "{s} is a work of {v}.",
            "{v} wrote {s}.",
            "The author of {s} is {v}.",
            "{s} is by {v}.",
            "{v} signed {s} on the last page.",
            "{v} was the author of {s}.",
            "The manuscript of {s} is in the hand of {v}.",
        ),
        (
            "{s} goes back to {v}, who wrote it alone.",
            "{v} put {s} on paper.",
        ),
        (
            "{v} is the creator of {s}.",
            "The manuscript of {s} bears the hand of {v}.",
        ),
    ),
    "year": Wordings(
        (
            "{s} was published in {v}.",
            "{s} first appeared in {v}.",
            "Readers could buy {s} from {v} on.",
            "The first edition of {s} is dated {v}.",
            "{s} came out in {v}.",
            "{s} dates from {v}.",
            "The year of publication of {s} is {v}.",
            "In {v} {s} reached the shops.",
            "{s} was printed in {v}.",
            "{v} saw the publication of {s}.",
        ),
        (
            "{s} left the press in {v}.",
            "It was {v} when {s} was released.",
        ),
        (
            "In {v} {s} came off the press.",
            "{s} has been in print since {v}.",
        ),
    ),
    "genre": Wordings(
        (
            "{s} is {v}.",
            "Critics class {s} as {v}.",
            "Libraries shelve {s} as {v}.",
            "{s} reads as {v}.",
            "{s} is considered {v}.",
            "{s} belongs on the shelf as {v}.",
            "Most readers take {s} for {v}.",
            "The publisher announced {s} as {v}.",
            "{s} was conceived as {v}.",
            "Teachers present {s} as {v}.",
        ),
        (
            "{s} can be described as {v}.",
            "Booksellers sell {s} as {v}.",
        ),
        (
            "In form {s} is {v}.",
            "One calls {s} {v}.",
        ),
    ),
    "setting": Wordings(
        (
            "{s} takes place in {v}.",
            "The story of {s} unfolds in {v}.",
            "{v} is the scene of {s}.",
            "The events of {s} happen in {v}.",
            "{s} is set in {v}.",
            "{v} is where {s} takes place.",
            "The plot of {s} belongs to {v}.",
            "{s} tells of life in {v}.",
            "All of {s} happens in {v}.",
            "The scenes of {s} are laid in {v}.",
        ),
        (
            "{s} is at home in {v}.",
            "It is {v} that forms the background of {s}.",
        ),
        (
            "{s} leads its readers through the streets of {v}.",
            "Everything in {s} plays out in {v}.",
        ),
    ),
}
