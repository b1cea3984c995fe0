"""The wire contract. Generated code: `make protos` writes it, CI proves it current."""
