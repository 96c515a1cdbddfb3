"""How a base lays out chats, and how its answers are read: templates, bounded where they come from strangers."""
