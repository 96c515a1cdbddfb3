"""`python -m adapterhub_app`."""

import sys

from adapterhub_app.launch import main

sys.exit(main())
