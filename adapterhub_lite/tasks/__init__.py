"""TODO-tasks"""
