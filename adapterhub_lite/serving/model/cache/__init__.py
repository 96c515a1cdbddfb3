"""What the rows of a step keep from one step to the next: keys and values, and other states."""
