"""What an adapter must pass before anything of it is loaded or published."""
