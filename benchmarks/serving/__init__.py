"""A server on loopback under faults, hostile input and observation: the parts of `serve_faults`."""
