"""Draws docs/images/switch.gif: one resident base, asked as itself and as two adapters, with real answers and times.

    python -m scripts.moving_picture [--into docs/images/switch.gif]

It takes the registry that `scripts/quickstart.sh` leaves. Switch times are those of the receipts of this very run.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from adapterhub_lite.quiet import quiet_libraries

INTO = Path(__file__).resolve().parents[1] / "docs" / "images" / "switch.gif"
SIZE, LEFT, TOP, LINE = (960, 430), 28, 24, 26
PAPER, INK, DIM, MARK, GOOD = "#0f172a", "#e2e8f0", "#94a3b8", "#38bdf8", "#4ade80"
WIDTH = 84
SQL = "List the 6 employees with the highest salary."
EVENT = "Workshop with Grace on Friday at 12:15 pm"
ASKED = ((None, SQL), ("sql@prod", SQL), ("event@prod", EVENT), ("sql@prod", "How many orders are there?"))
# Milliseconds: of a typed piece, of a written piece, after an answer, at the end.
TYPED, WRITTEN, PAUSE, END = 70, 60, 1400, 4000


@dataclass(frozen=True)
class Answer:
    """What was asked of whom, and what came."""

    adapter: str
    question: str
    text: str
    switch_ms: float
    receipt: str


def ask(base: str) -> list[Answer]:
    """Ask each question of one engine; nothing is loaded between them."""
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving import GenerationRequest, InferenceEngine

    found = []
    with InferenceEngine.from_base(base, registry=AdapterRegistry()) as engine:
        for adapter, _ in ASKED:  # from disk into memory, once
            engine.generate(GenerationRequest(prompt="Hello", adapter=adapter, max_new_tokens=1))
        for adapter, question in ASKED:
            messages = [{"role": "user", "content": question}]
            result = engine.generate(GenerationRequest(messages=messages, adapter=adapter, max_new_tokens=48))
            digest = (result.adapter_digest or "").removeprefix("sha256:")[:12]
            receipt = f"adapter {digest or 'none'}  base {result.base_fingerprint.removeprefix('sha256:')[:12]}"
            name = adapter or "base"
            found.append(Answer(name, question, result.text.strip(), 1000 * result.timings.switch_seconds, receipt))
    return found


def wrapped(text: str) -> list[str]:
    """Lines of at most `WIDTH` characters, three at most."""
    flat = " ".join(text.split())
    lines = [flat[start : start + WIDTH] for start in range(0, len(flat), WIDTH)] or [""]
    return lines if len(lines) <= 3 else [*lines[:2], lines[2][: WIDTH - 1] + "…"]


def frames(answers: list[Answer]) -> tuple[list[Image.Image], list[int]]:
    """The pictures and how long each stands, in milliseconds."""
    from matplotlib import font_manager

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 17)
    pictures, times = [], []

    def show(number: int, question: str, lines: list[str], receipt: str, milliseconds: int) -> None:
        picture = Image.new("RGB", SIZE, PAPER)
        draw = ImageDraw.Draw(picture)
        draw.text((LEFT, TOP), "one resident base: SmolLM2-135M-Instruct", DIM, font)
        names = dict.fromkeys(answer.adapter for answer in answers)
        x = LEFT
        for name in names:
            chosen = name == answers[number].adapter
            draw.text((x, TOP + 2 * LINE), f"[{name}]" if chosen else f" {name} ", MARK if chosen else DIM, font)
            x += 12 * (len(name) + 3)
        draw.text((LEFT, TOP + 4 * LINE), f"> {question}", INK, font)
        for row, line in enumerate(lines):
            draw.text((LEFT, TOP + (6 + row) * LINE), line, GOOD, font)
        if receipt:
            draw.text((LEFT, TOP + 10 * LINE), f"switched in {answers[number].switch_ms:.2f} ms", INK, font)
            draw.text((LEFT, TOP + 11 * LINE), f"receipt: {receipt}", DIM, font)
        pictures.append(picture.quantize(16))
        times.append(milliseconds)

    for number, answer in enumerate(answers):
        for end in range(0, len(answer.question), 6):
            show(number, answer.question[:end] + "_", [], "", TYPED)
        lines = wrapped(answer.text)
        whole = "\n".join(lines)
        for end in range(0, len(whole), 8):
            show(number, answer.question, whole[:end].split("\n"), "", WRITTEN)
        show(number, answer.question, lines, answer.receipt, END if number == len(answers) - 1 else PAUSE)
    return pictures, times


def main() -> None:
    """Ask, draw, say how large it came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--into", type=Path, default=INTO)
    chosen = parser.parse_args()
    quiet_libraries()
    pictures, times = frames(ask(chosen.base))
    pictures[0].save(chosen.into, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    print(f"{chosen.into}: {chosen.into.stat().st_size / 1e6:.2f} MB, {len(pictures)} pictures")


if __name__ == "__main__":
    main()
