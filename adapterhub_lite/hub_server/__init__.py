"""A small Hugging Face Hub on loopback: for the quickstart, for tests, and for teams without a network.

It answers what the unmodified `huggingface_hub` and `datasets` clients ask to create, publish, read, tag, list, rename
and delete repositories of models and data sets; every other operation is refused in a sentence before anything is written.
Its limits: it has one flat pool of contents (whoever knows a sha256 may link it), keeps no git objects (so no
`git clone`), chooses the upload mode by the file name, checks of a card only that its YAML parses and that
`base_model` and `model-index` have their forms, has no pull requests, scanning or spaces, and serves Xet through the
client's own on-disk scheme `local://`, which works only for clients on the same machine (others set
HF_HUB_DISABLE_XET=1). It binds to 127.0.0.1 and speaks plain HTTP; one hub may own a data folder at a time. A file or
a ref appears whole or not at all, but nothing is flushed to disk: after a power cut the last commits may be missing.
"""

from adapterhub_lite.hub_server.app import create_app
from adapterhub_lite.hub_server.faults import FAULT_KINDS, Fault, Faults
from adapterhub_lite.hub_server.hub import Account
from adapterhub_lite.hub_server.server import HubServer

__all__ = ["FAULT_KINDS", "Account", "Fault", "Faults", "HubServer", "create_app"]
