"""Each file answers one question by measuring; results are JSON in results/, with machine, versions, command and date."""
