"""What can be done with a registry, one operation a module."""
