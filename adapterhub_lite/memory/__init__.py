"""TODO-memory"""
