"""TODO-training"""
