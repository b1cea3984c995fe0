"""Version 1 of the wire contract (proto package `freshrank.v1`)."""
