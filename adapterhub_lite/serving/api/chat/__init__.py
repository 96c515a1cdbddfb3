"""Chats: their messages, tools and calls, and the responses format over them."""
