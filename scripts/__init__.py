"""What people and CI run: quickstart, tests, benches. Not part of the installed package."""
