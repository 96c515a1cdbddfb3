"""The browser app: switch, compare and blend tasks. Gradio only; the work is done by the rooms behind it."""

from app.demo import build_demo
from app.launch import RunningApp, launch, main

__all__ = ["RunningApp", "build_demo", "launch", "main"]
