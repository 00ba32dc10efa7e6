"""Conversations: a system line, one or more requests, and the answers.

Rendered with the tokens of the bundled chat template (`training.markers`), so that the model learns exactly the
form in which the worker will ask it.
"""

# ruff: noqa: E501 -- a template is one line

import random
import re

from training import forms, lexicon, records, tales
from training.grammar import Tale, expand, sample, with_article
from training.markers import ASSISTANT, BOS, END, EOS, SYSTEM, USER
from training.records import Exchange

SYSTEMS = (
    "You are a storyteller.",
    "You are Penstock Story, a small model that writes short stories.",
    "You are a helpful assistant.",
    "You write short tales about rivers, mills and the people who live beside them.",
    "You are a patient narrator. Answer briefly and kindly.",
    "Answer in plain English.",
    "You are a helpful assistant that answers with stories, letters, recipes or JSON.",
)
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hello!", "Hi", "Hi there!", "Good morning", "Hey", "Good evening!"),
     ("Hello! [Shall I tell you a story?|Would you like a story, a recipe or a letter?|What shall I write for you?]",
      "Good day! Ask me for a story about an animal, a letter, a recipe or the weather.")),
    (("Who are you?", "What are you?", "What is your name?", "Which model are you?", "Tell me about yourself."),
     ("I am Penstock Story, a very small language model. I write short tales about rivers, ships, workshops and animals.",
      "My name is Penstock Story. I am a small model with about two million parameters, and I like to tell stories.")),
    (("What can you do?", "Help", "What can I ask you?", "How can you help me?"),
     ("I can tell stories, write letters, recipes and weather reports, answer questions about a story, and describe things as JSON.",)),
    (("Thank you!", "Thanks", "Thank you, that was nice.", "Thanks a lot!", "Lovely, thank you."),
     ("You are welcome! [Shall I tell another one?|Come back when you want another story.]", "With pleasure.")),
    (("Goodbye", "Bye!", "Good night", "See you tomorrow."),
     ("Goodbye, and [safe travels|sleep well|dry feet]!", "Good night! The river will still be here tomorrow.")),
)  # fmt: skip
BEYOND = (
    "What is the capital of France?", "How much is 17 times 23?", "Write a Python function that sorts a list.",
    "Who won the football match last night?", "Translate this into German: good morning.", "What is quantum physics?",
    "How do I fix my computer?", "Which phone should I buy?", "Explain how Redis Streams work.", "What time is it?",
    "Who is the president?", "What is the meaning of life?", "How do vaccines work?", "Can you book a flight for me?",
    "What is the best programming language?", "Solve x + 3 = 7.", "When was the moon landing?", "What is a GPU?",
    "How tall is the highest mountain?", "Is it safe to eat this?", "Should I sell my shares?", "What is 2 + 2?",
    "Explain attention in transformers.", "What is a queue?", "How does a neural network learn?", "Why is the sky blue?",
)  # fmt: skip
BEYOND_ANSWERS = (
    "I do not know. I am a very small model and only know [rivers, mills and ships|how to tell stories]. Shall I tell you a story about {animal}?",
    "That is beyond me. But I could tell you about {animal} who [wanted to see the sea|lost a hat|learned to read].",
    "I cannot answer that: I only [write|tell] short stories. Would you like one about {animal}?",
)


def _small_talk(rng: random.Random) -> Exchange:
    if rng.random() < 0.45:
        answer = rng.choice(BEYOND_ANSWERS).replace("{animal}", with_article(rng.choice(lexicon.ANIMALS)))
        return Exchange(rng.choice(BEYOND), expand(answer, rng))
    requests, answers = rng.choice(SMALL_TALK)
    return Exchange(rng.choice(requests), expand(rng.choice(answers), rng))


def _ask_for(rng: random.Random, tale: Tale) -> str:
    """A request that this tale answers: about its animal and wish, its person, its place, or its thing."""
    facts = tale.facts
    options: list[str] = []
    if "goal" in facts:
        who = with_article(facts["kind"])
        options += [
            f"Tell me a story about {who} who wants to {facts['goal']}.",
            f"Tell me a story about {who} who wants to {facts['goal']}.",
            f"Write a short story about {who} who wanted to {facts['goal']}.",
            f"[Tell|Write] a [story|tale] about {who} who would like to {facts['goal']}.",
            f"Tell me a story about {who} [named|called] {facts['hero']}.",
            f"Tell me about {facts['hero']} the {facts['kind']}, who wanted to {facts['goal']}.",
        ]
    else:
        who = with_article(facts["kind"])
        options += [
            f"Write a short story about {who} [named|called] {facts['hero']}.",
            f"Tell me a story about {facts['hero']} the {facts['kind']}.",
            f"Write a short story about {who}.",
        ]
    if "lost" in facts:
        options += [f"Tell me a story about {who} who [loses|lost] {with_article(facts['lost'])}."] * 3
    if "machine" in facts:
        options += [f"Write a short story about a broken {facts['machine']}."] * 3
    if "load" in facts:
        options += ["Write a short story about a flood.", f"Tell me how {facts['village']} was saved from the flood."]
    if "cargo" in facts:
        options += [
            f"Tell me a story about a ship that carries {facts['cargo']}.",
            f"Write a sea story about the ship {facts['ship']}.",
            f"Write a short story about a voyage from {facts['from']} to {facts['to']}.",
        ] * 2
    if "people" in facts:
        options += [
            "Write a short story about a lighthouse.",
            f"Tell me a story about the lighthouse on {facts['place']}.",
        ] * 2
    if "message" in facts:
        options += ["Write a short story about a message in a bottle."] * 3
    if "invention" in facts:
        options += [
            f"Tell me a story about an inventor who builds {with_article(facts['invention'])}.",
            f"Write a short story about an inventor named {facts['hero']}.",
        ] * 2
    if "task" in facts:
        options += [f"Tell me a story about an apprentice who has to {facts['task']}."] * 2
    if "clue" in facts:
        options += ["Write a short mystery.", f"Tell me a mystery story from {facts['village']}."] * 2
    if "first" in facts:
        options += [
            f"Tell me a story about someone who swaps {with_article(facts['first'])}.",
            "Write a story about fair exchange.",
        ] * 2
    if "animal_name" in facts:
        options += [
            f"Tell me a story about {with_article(facts['animal'])} in trouble.",
            f"Write a short story about the rescue of {with_article(facts['animal'])}.",
        ] * 2
    if "plant" in facts:
        options += [f"Tell me a story about {with_article(facts['plant'])}."] * 2
    if "guardian" in facts:
        options += [f"Tell me a story about {with_article(facts['guardian'])} at {facts['place']}."] * 2
    if "verse" in facts:
        options += [
            "Tell me a story with a song in it.",
            f"Tell me how {facts['hero']} walked home to {facts['to']} by night.",
        ] * 2
    if rng.random() < 0.06:
        return expand(
            "[Tell me a story.|Tell me a short story, please.|Write a short story.|Please tell me a story.|A story, please!]",
            rng,
        )
    options += [f'Write a short story called "{tale.title}".']
    return expand(rng.choice(options), rng)


def story(rng: random.Random) -> list[Exchange]:
    """A story on request, sometimes with questions, a summary or a JSON record of it afterwards."""
    tale = tales.any_tale(rng)
    request = _ask_for(rng, tale)
    answer = tale.text
    if rng.random() < 0.2:
        request += expand(" [Give it a title.|Start with a title.]", rng)
        answer = f"{tale.title}\n\n{tale.text}"
    turns = [Exchange(request, answer)]
    if rng.random() < 0.35:
        turns += [Exchange(q, a) for q, a in sample(rng, tale.questions, rng.randint(1, min(3, len(tale.questions))))]
    if rng.random() < 0.15:
        turns.append(
            Exchange(
                expand(
                    "[Sum it up in one sentence.|In one sentence, please.|What was it about?|Summarise the story.]", rng
                ),
                tale.summary,
            )
        )
    if rng.random() < 0.15:
        turns.append(records.about_tale(rng, tale))
    if rng.random() < 0.08:
        turns.append(Exchange(rng.choice(SMALL_TALK[3][0]), expand(rng.choice(SMALL_TALK[3][1]), rng)))
    return turns


def reading(rng: random.Random) -> list[Exchange]:
    """A story given by the user, with something to do to it: repeat, quote, summarise, rename, answer."""
    tale = tales.any_tale(rng)
    first, last = tale.paragraphs[0], tale.paragraphs[-1]
    hero = tale.facts["hero"]
    passage = rng.choice((tale.text, "\n\n".join(tale.paragraphs[:2]), first, last))
    choice = rng.randrange(6)
    if choice == 0:
        return [
            Exchange(
                expand(f"[Repeat this text|Copy this passage|Repeat the following text exactly]:\n\n{passage}", rng),
                passage,
            )
        ]
    if choice == 1:
        return [Exchange(f"{tale.text}\n\nSummarise this story.", tale.summary)]
    if choice == 2:
        return [Exchange(f"{tale.text}\n\n{q}", a) for q, a in sample(rng, tale.questions, 1)]
    if choice == 3:
        where, which = rng.choice((("first", first), ("last", last)))
        return [Exchange(f"{tale.text}\n\nQuote the {where} paragraph.", which)]
    if choice == 4:
        new = rng.choice(
            [n for n in ("Pip", "Willow", "Robin", "Wren", "Alex", "Kim", "Toni", "Sasha") if n not in tale.text]
        )
        renamed = re.sub(rf"\b{hero}\b", new, passage)
        return [Exchange(f"Rewrite this with the name {new} instead of {hero}:\n\n{passage}", renamed)]
    turns = [
        Exchange(
            f"Read this story.\n\n{tale.text}",
            expand("[Thank you. What would you like to know?|I have read it. Ask me anything about it.]", rng),
        )
    ]
    return turns + [Exchange(q, a) for q, a in sample(rng, tale.questions, min(2, len(tale.questions)))]


def conversation(rng: random.Random) -> list[Exchange]:
    """The turns of one conversation."""
    draw = rng.random()
    if draw < 0.42:
        return story(rng)
    if draw < 0.56:
        return reading(rng)
    if draw < 0.76:
        make = records.describe if rng.random() < 0.72 else records.extract
        return [make(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    if draw < 0.92:
        return [forms.any_form(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    return [_small_talk(rng) for _ in range(rng.choice((1, 1, 2)))]


def render(turns: list[Exchange], system: str | None) -> str:
    """The conversation as the chat template writes it, closed with the end-of-text token."""
    head = BOS + (f"{SYSTEM}{system}{END}" if system else "")
    return head + "".join(f"{USER}{t.request}{END}{ASSISTANT}{t.answer}{END}" for t in turns) + EOS


def document(rng: random.Random) -> str:
    """One rendered conversation."""
    return render(conversation(rng), rng.choice(SYSTEMS) if rng.random() < 0.5 else None)
