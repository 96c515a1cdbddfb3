"""One measured question a file; results are JSON in results/, with machine, versions, command and date."""
