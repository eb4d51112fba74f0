"""Sockets: the client's side and the providers'."""
