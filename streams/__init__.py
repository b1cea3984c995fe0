"""Kafka to RocksDB: producer, store, view, worker, reader, import."""
