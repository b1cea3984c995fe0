"""The algebra of freshrank: what an action, a sequence, a table and a packed request are. No Kafka, gRPC, torch or clock in here."""
