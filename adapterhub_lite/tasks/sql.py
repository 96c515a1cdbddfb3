"""The `sql` task: a question about a small shop, answered with one SQL query."""

import random

from adapterhub_lite.tasks.task import Task

# table -> (text columns with their values, number columns)
TABLES: dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "customers": (
        {"city": ("Paris", "Oslo", "Lima", "Cairo", "Tokyo"), "country": ("France", "Norway", "Peru", "Japan")},
        ("age", "visits"),
    ),
    "orders": (
        {"status": ("shipped", "pending", "cancelled", "paid"), "channel": ("web", "phone", "store")},
        ("total", "weight"),
    ),
    "products": (
        {"category": ("toys", "books", "garden", "music"), "color": ("red", "blue", "green", "black")},
        ("price", "stock"),
    ),
    "employees": (
        {"team": ("sales", "support", "finance", "design"), "office": ("Berlin", "Madrid", "Rome")},
        ("salary", "age"),
    ),
}
AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}
COMPARISONS = {"more than": ">", "less than": "<", "exactly": "="}


def count_question(generator: random.Random, table: str) -> tuple[str, str]:
    """How many rows meet a condition."""
    column, value = _condition(generator, table)
    opening = generator.choice(("How many {t} have {c} {v}?", "Count the {t} with {c} {v}."))
    return (
        opening.format(t=table, c=column, v=value),
        f"SELECT COUNT(*) FROM {table} WHERE {column} = '{value}';",
    )


def aggregate_question(generator: random.Random, table: str) -> tuple[str, str]:
    """An average, extreme or total of a column."""
    word, function = generator.choice(list(AGGREGATES.items()))
    number = generator.choice(TABLES[table][1])
    column, value = _condition(generator, table)
    return (
        f"What is the {word} {number} of {table} with {column} {value}?",
        f"SELECT {function}({number}) FROM {table} WHERE {column} = '{value}';",
    )


def compare_question(generator: random.Random, table: str) -> tuple[str, str]:
    """The rows whose number is above, below or at a bound."""
    words, sign = generator.choice(list(COMPARISONS.items()))
    number = generator.choice(TABLES[table][1])
    bound = generator.randrange(5, 100, 5)
    opening = generator.choice(("Show the {t} with {n} {w} {b}.", "Which {t} have {n} {w} {b}?"))
    return (
        opening.format(t=table, n=number, w=words, b=bound),
        f"SELECT * FROM {table} WHERE {number} {sign} {bound};",
    )


def top_question(generator: random.Random, table: str) -> tuple[str, str]:
    """The first rows by a column."""
    word, order = generator.choice((("highest", "DESC"), ("lowest", "ASC")))
    number = generator.choice(TABLES[table][1])
    limit = generator.randrange(2, 10)
    return (
        f"List the {limit} {table} with the {word} {number}.",
        f"SELECT * FROM {table} ORDER BY {number} {order} LIMIT {limit};",
    )


def _condition(generator: random.Random, table: str) -> tuple[str, str]:
    column, values = generator.choice(list(TABLES[table][0].items()))
    return column, generator.choice(values)


def sample(generator: random.Random) -> tuple[str, str]:
    """Draw one question and the query that answers it."""
    kind = generator.choice((count_question, aggregate_question, compare_question, top_question))
    return kind(generator, generator.choice(list(TABLES)))


SQL = Task(
    name="sql",
    description="A question about a shop's tables, answered with one SQL query.",
    sample=sample,
)
