"""The command line: one verb a module. Parse, call, report; the rooms do the work."""
