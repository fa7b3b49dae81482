"""The demo: from nothing to an elastic model on a cluster, a load step, and a report of both runs.

Run by ``make demo`` (``python -m hack.demo``) and, with assertions, by tests/cluster. Nothing here
knows how Prism works inside: it sees a cluster, an OpenAI API and Prometheus, as a user does.
"""
