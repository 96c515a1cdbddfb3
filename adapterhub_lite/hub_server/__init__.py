"""TODO-hub_server"""
