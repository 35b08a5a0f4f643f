"""How a fact of what a fact names is asked for: "Where was the author of {s} born?"

Most such questions are composed: a question for the second fact, asked about a description by the first one. Those for
testing are not.

Legend: {s} stands for an entity, [this|that] for one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from rag.data.factwords import Wordings

DESCRIPTIONS = {  # relation: whom or what a question means by it, for training and for validation
    "author": (
        (
            "the [author|writer|originator|maker] of {s}",
            "the [person|one|author|writer] who [wrote|penned|authored|composed|created|produced] {s}",
            "the [person|one|author|writer] by whom {s} was [written|penned|composed|created]",
            "whoever [wrote|penned|composed|created|authored] {s}",
            "the [mind|talent|writer] behind {s}",
            "the [person|writer|author] from whose [pen|hand|desk] {s} [came|flowed]",
            "the [author|writer|person] [responsible for|credited with] {s}",
            "the [author|writer|person] named on the [cover|title page|spine] of {s}",
            "the [person|writer|author] who [set down|put on paper|thought up|put into words] {s}",
            "the [person|author|writer] to whom {s} is [owed|credited|attributed|ascribed]",
            "the [person|author|writer] who gave [the world|readers|us] {s}",
            "the [person|author|writer] whose [work|book|creation|handiwork] {s} is",
        ),
        (
            "the creator of {s}",
            "the person behind {s}",
        ),
    ),
    "birthplace": (
        (
            "the [birthplace|native town|home town|hometown|place of birth|native place|birth town] of {s}",
            "the [town|place|city] where {s} [was born|came into the world|first saw the light of day]",
            "the [town|place|city|settlement] in which {s} was [born|brought into the world]",
            "the [town|place] [from which|from where] {s} [came|hailed|originated]",
            "the [town|place|city] {s} [came|hailed|came originally|originated] from",
            "the [town|place] that [saw|witnessed] the birth of {s}",
            "the [town|place] of which {s} was [a native|a child by birth|a son or daughter]",
            "the [town|place] that [gave the world|produced|brought forth] {s}",
            "the [town|place] in which the [cradle of {s} stood|life of {s} began|roots of {s} lie]",
            "the [town|place] where the [life|story] of {s} [began|started]",
            "the [town|place] that [counts|claims] {s} as [a native|one of its own by birth]",
            "the [town|place] whose [registers|church books] record the birth of {s}",
        ),
        (
            "the town of {s}'s birth",
            "the place that {s} comes from",
        ),
    ),
    "teacher": (
        (
            "the [teacher|master|instructor|mentor|educator|trainer] of {s}",
            "the [person|one|teacher|master] who [taught|instructed|trained|educated|schooled|tutored] {s}",
            "the [person|one|teacher|master] under whom {s} [studied|trained|learned|served an apprenticeship]",
            "the [person|one|teacher] from whom {s} [learned|took lessons|received instruction|learned the craft]",
            "the [person|one|teacher] by whom {s} was [taught|trained|instructed|educated|tutored]",
            "the [person|one] whose [pupil|student|apprentice|disciple] {s} was",
            "whoever [taught|trained|instructed|educated|tutored] {s}",
            "the [person|teacher|master] with whom {s} [studied|trained|took lessons]",
            "the [person|teacher] who gave [lessons|instruction|classes|tuition] to {s}",
            "the [person|teacher|master] who took {s} on as [a pupil|an apprentice|a student]",
            "the [person|teacher] in whose [class|school|lessons|workshop] {s} [learned|studied]",
            "the [person|teacher|master] to whom {s} owed [an education|so much learning|this training]",
        ),
        (
            "the tutor of {s}",
            "the one who prepared {s}",
        ),
    ),
    "setting": (
        (
            "the [setting|location|place of action|locale] of {s}",
            "the [town|place|city] where {s} [takes place|is set|happens|unfolds|plays out]",
            "the [town|place|city] in which {s} [is set|takes place|happens|unfolds]",
            "the [town|place] where the [story|plot|action|tale|narrative] of {s} [unfolds|takes place|is laid]",
            "the [town|place] in which the [events|scenes|adventures|episodes] of {s} [happen|occur|take place]",
            "the [town|place] where the [characters|heroes|people] of {s} [live|dwell|meet]",
            "the [town|place] that [serves|acts|is used] as the [setting|backdrop|stage|scene] for {s}",
            "the [town|place] [of which {s} tells|that {s} describes|that {s} portrays|depicted in {s}]",
            "the [town|place|city] {s} [is set in|takes place in|tells of]",
            "the [town|place] to which {s} [takes|leads|carries] [the reader|its readers]",
            "the [town|place] chosen as the [setting|scene|backdrop] of {s}",
            "the [town|place] that [forms|provides] the [setting|scene] of {s}",
        ),
        (
            "the scene of {s}",
            "the town that forms the background of {s}",
        ),
    ),
}

WHOLE = {  # (a fact of the entity, a fact of what that names): questions that are not composed, for training and test
    ("author", "birthplace"): (
        (
            "Where was the author of {s} born?",
            "In which town was the author of {s} born?",
            "What is the birthplace of the author of {s}?",
        ),
        (
            "Which place does the writer of {s} hail from?",
            "Name the home town of whoever wrote {s}.",
        ),
    ),
    ("author", "profession"): (
        (
            "What was the profession of the author of {s}?",
            "What did the author of {s} do for a living?",
            "Which occupation did the author of {s} have?",
        ),
        (
            "What kind of job did the writer of {s} hold?",
            "How did whoever wrote {s} make money?",
        ),
    ),
    ("birthplace", "region"): (
        (
            "In which region was {s} born?",
            "In which region is the birthplace of {s}?",
            "Which region does the birthplace of {s} belong to?",
        ),
        (
            "What part of the country does {s} hail from?",
            "To which region should one go to see the home town of {s}?",
        ),
    ),
    ("birthplace", "founded"): (
        (
            "When was the birthplace of {s} founded?",
            "In which year was the town where {s} was born founded?",
            "What is the founding year of the birthplace of {s}?",
        ),
        (
            "What year marks the beginning of the home town of {s}?",
            "When did the town that {s} hails from come into existence?",
        ),
    ),
    ("teacher", "award"): (
        (
            "Which award did the teacher of {s} win?",
            "What award was the teacher of {s} given?",
            "Which prize did the teacher of {s} receive?",
        ),
        (
            "What distinction did the mentor of {s} obtain?",
            "Which honour came to the mentor of {s}?",
        ),
    ),
    ("setting", "product"): (
        (
            "What is the town known for in which {s} is set?",
            "What is made in the town where {s} takes place?",
            "Which goods come from the setting of {s}?",
        ),
        (
            "What do the people of the town that {s} describes manufacture?",
            "What is the speciality of the location of {s}?",
        ),
    ),
}


def composed(questions: tuple[str, ...], descriptions: tuple[str, ...]) -> tuple[str, ...]:
    """Every question, about everything that is described; but none for which a description would need an ending."""
    whole = (question for question in questions if "{s}'s" not in question)
    return tuple(question.format(s=description) for question, description in product(whole, descriptions))


def compose(questions: Mapping[str, Wordings]) -> dict[tuple[str, str], Wordings]:
    """(a fact of an entity, a fact of what that names) -> how the second one is asked for.

    Args:
        questions: how one fact is asked for.
    """
    asked = {}
    for (first, second), (whole, test) in WHOLE.items():
        known, new = DESCRIPTIONS[first]
        train = (*whole, *composed(questions[second].train, known))
        asked[first, second] = Wordings(train, composed(questions[second].validation, new), test)
    return asked
