"""The curation of web pages as matrix-bus, Ray Data and plain asyncio do it, over the same simulated endpoints."""
