"""What is guessed from earlier answers and from the prompt: the same words, and what they copy put in anew."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.serving.engine.reuse.guesses import Habits, Writing

TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=30)
CODES: dict[str, int] = {}


def tokens(text: str) -> list[int]:
    """A token for each word."""
    return [CODES.setdefault(word, len(CODES)) for word in text.split()]


def words(found: Sequence[int]) -> str:
    names = {code: word for word, code in CODES.items()}
    return " ".join(names[token] for token in found)


def written(prompt: str, answer: str) -> Writing:
    writing = Writing(tokens(prompt))
    for token in tokens(answer):
        writing.write(token)
    return writing


def learned(*answers: tuple[str, str]) -> Habits:
    habits = Habits()
    for prompt, answer in answers:
        habits.add(written(prompt, answer))
    return habits


SHOP = (
    ("which orders have weight below 90 ? :", "select * from orders where weight < 90 ;"),
    ("which customers have age below 25 ? :", "select * from customers where age < 25 ;"),
)


def test_what_earlier_answers_copied_is_copied_from_the_new_prompt() -> None:
    writing = Writing(tokens("which employees have salary below 70 ? :"))
    guess = words(writing.guess(learned(*SHOP * 2), [], 20))
    assert guess == "select * from employees where salary < 70 ;"


def test_a_copy_of_several_tokens_goes_on_to_its_end() -> None:
    habits = learned(
        ("call ann mary of smith now :", "name ann mary of smith ."), ("call bo lee now :", "name bo lee .")
    )
    assert words(written("call jo van der berg now :", "name").guess(habits, [], 4)) == "jo van der berg"


def test_what_follows_a_copy_does_not_depend_on_where_it_was_taken_from() -> None:
    habits = learned(("in a paris :", "say paris please"), ("at b oslo :", "say oslo please"))
    assert words(written("by c lima :", "say lima").guess(habits, [], 1)) == "please"


def test_with_no_answer_before_what_was_copied_goes_on() -> None:
    assert words(written("repeat a b c d e f :", "a b c").guess(None, [], 3)) == "d e f"
    assert Writing(tokens("a b c :")).guess(None, [], 3) == []


def test_of_two_ways_the_frequent_one_is_guessed_and_of_many_none() -> None:
    answers = [(f"p{at} :", "yes it is") for at in range(5)] + [("q :", "no not so")]
    assert words(Writing(tokens("new :")).guess(learned(*answers), [], 3)) == "yes it is"
    many = [(f"p{at} :", f"w{at} it is") for at in range(20)]
    assert Writing(tokens("new :")).guess(learned(*many), [], 3) == []


@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=4), TOKENS, TOKENS, TOKENS)
def test_a_guess_begins_with_what_is_certain_and_changes_nothing(
    earlier: list[tuple[list[int], list[int]]], prompt: list[int], answer: list[int], known: list[int]
) -> None:
    habits = Habits()
    for before, after in earlier:
        past = Writing(before)
        for token in after:
            past.write(token)
        habits.add(past)
    writing = Writing(prompt)
    for token in answer:
        writing.write(token)
    most = len(known) + 4
    guess = writing.guess(habits, known, most)
    assert guess[: len(known)] == known and len(guess) <= most
    assert writing.guess(habits, known, most) == guess
    shorter = writing.guess(habits, known, most - 2)
    assert shorter == guess[: most - 2]
    met = set(prompt + answer + known).union(*(set(before + after) for before, after in earlier))
    assert set(guess) <= met
