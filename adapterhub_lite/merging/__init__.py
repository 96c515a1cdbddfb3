"""TODO-merging"""
