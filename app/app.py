"""The file a Hugging Face Space starts; everything it does is in `adapterhub_app.space`."""

from adapterhub_app.space import main

main()
