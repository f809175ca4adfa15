"""The server: transport, sessions, admission, executor, metrics, configuration, health and drain."""
