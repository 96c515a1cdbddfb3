"""`python -m scripts.quickstart [--headless] [--fresh]`."""

from adapterhub_lite.quiet import quiet_libraries

if __name__ == "__main__":
    # Before anything that speaks at its import, such as bitsandbytes.
    quiet_libraries()
    from scripts.quickstart.run import main

    main()
