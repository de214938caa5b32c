"""The pattern: index algebra as laws."""
