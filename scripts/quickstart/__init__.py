"""The whole journey on a real base: train two tasks, share them, switch between them, open the app."""
