"""Rows as somebody wrote them: out of files, in whatever shape, into tables."""
