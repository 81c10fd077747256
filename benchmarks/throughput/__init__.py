"""Throughput and latency of a served guard, beside the limit of its arithmetic and beside what users would pick instead."""
