"""TODO-serving"""
