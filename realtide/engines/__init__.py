"""Engines: model logic on slots, without transport."""
