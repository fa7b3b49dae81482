"""What goes wrong with clusters in a way that a person can mend."""


class ClusterError(RuntimeError):
    """The message says what is the matter and what to do."""
