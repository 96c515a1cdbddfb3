"""How answers, tasks and errors are presented on the page: plain functions without Gradio components."""
