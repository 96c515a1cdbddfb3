"""Errors as people read them: one sentence in place, never a traceback. Knows the error tree, not the page."""

import logging

from adapterhub_lite.errors import AdapterHubError

LOG = logging.getLogger("adapterhub_lite.app")


def sentence(error: Exception) -> str:
    """The sentence for an error. One that is not ours is logged with its traceback and only named on the page."""
    if isinstance(error, AdapterHubError):
        return str(error)
    LOG.error("unexpected error in the app", exc_info=error)
    return f"Something went wrong inside the app ({type(error).__name__}); its log has the details. Try again."
