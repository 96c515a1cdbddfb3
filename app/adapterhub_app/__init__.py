"""The browser app: switch, compare and blend tasks. Gradio only; the work is done by the rooms behind it."""

from adapterhub_app.demo import build_demo
from adapterhub_app.launch import RunningApp, launch, main

__all__ = ["RunningApp", "build_demo", "launch", "main"]
