"""Grafana dashboards as code: what they show in `overview`, `speech`, `video`; how in `panels`.

``python tools/generate_deploy.py`` writes them to ``deploy/grafana``.
"""
