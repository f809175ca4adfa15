"""Benchmarks behind the claims of the README (docs/benchmarks.md says what each measures)."""
