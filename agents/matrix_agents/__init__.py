"""Workflows that come with matrix-bus, written against its public names alone."""
