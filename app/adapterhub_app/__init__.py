"""The browser app: switch, compare and blend tasks. It holds the Gradio pages only; the package behind them does the work."""

from adapterhub_app.demo import build_demo
from adapterhub_app.launch import RunningApp, launch, main

__all__ = ["RunningApp", "build_demo", "launch", "main"]
