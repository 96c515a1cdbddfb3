"""The two example tasks of the quickstart, as seeded generators. Standard library only; knows no model.

Train and held-out rows are apart by construction: a question belongs to one split by its own hash, whatever the seed.
"""

from adapterhub_lite.errors import UnknownNameError
from adapterhub_lite.tasks.event import EVENT
from adapterhub_lite.tasks.sql import SQL
from adapterhub_lite.tasks.task import Row, Split, Task

TASKS: dict[str, Task] = {task.name: task for task in (SQL, EVENT)}


def get_task(name: str) -> Task:
    """Return the example task called `name`.

    Raises:
        UnknownNameError: no such task; the text lists those there are.
    """
    if name not in TASKS:
        raise UnknownNameError.among("task", name, list(TASKS))
    return TASKS[name]


__all__ = ["TASKS", "Row", "Split", "Task", "get_task"]
