"""Where versions lie: the database, the contents by sha256, locks and the journal. Knows no hub."""
