"""What every server of this project checks before it trusts a connection or a browser: the API, the hub and the app."""
