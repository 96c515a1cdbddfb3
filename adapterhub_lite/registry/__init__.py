"""TODO-registry"""
