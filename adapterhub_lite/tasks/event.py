"""The `event` task: a sentence about an appointment, answered with a JSON calendar event on a 24-hour clock."""

import json
import random

from adapterhub_lite.tasks.task import Task

ACTIVITIES = ("Lunch", "Dinner", "Call", "Meeting", "Coffee", "Interview", "Tennis", "Workshop")
PEOPLE = ("Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SENTENCES = (
    "{title} on {day} at {time}",
    "Schedule {title} for {day} at {time}.",
    "Please book {title}, {day} {time}.",
    "At {time} on {day} I have {title}.",
)


def sample(generator: random.Random) -> tuple[str, str]:
    """Draw one sentence and its event."""
    title = f"{generator.choice(ACTIVITIES)} with {generator.choice(PEOPLE)}"
    day = generator.choice(DAYS)
    hour, minute = generator.randrange(24), generator.choice((0, 15, 30, 45))
    sentence = generator.choice(SENTENCES).format(title=title, day=day, time=twelve_hour(hour, minute))
    return sentence, json.dumps({"title": title, "day": day, "time": f"{hour:02d}:{minute:02d}"})


def twelve_hour(hour: int, minute: int) -> str:
    """Write a time of the 24-hour clock as people say it: 0:05 is "12:05 am", 13:30 is "1:30 pm"."""
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


EVENT = Task(
    name="event",
    description="A sentence about an appointment, answered with a JSON event on a 24-hour clock.",
    sample=sample,
)
