"""What an adapter folder is, once, for everybody: names, configuration, manifest, record, probes. Imports no torch."""
