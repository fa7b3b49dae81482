"""The parts of the local cluster: see ../local-cluster."""
